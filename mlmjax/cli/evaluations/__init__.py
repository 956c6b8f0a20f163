"""Evaluate models for the command line.

The options of `mlmjax evaluate` enter; results are printed and written. This folder knows nothing
of how options are defined.
"""
