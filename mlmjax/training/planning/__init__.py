"""Plan a run on a machine that is not here.

A run configuration and a topology enter; memory, FLOPs and a verdict leave.
"""
