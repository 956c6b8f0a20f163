"""Evaluation of models on tasks, reports on it, and comparisons of two evaluations.

A model and a task enter; a result folder leaves.
"""
