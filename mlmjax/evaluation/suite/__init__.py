"""Many tasks and models in one table, with sweeps and seeds.

A suite file and models enter; a results folder with a report leaves.
"""
