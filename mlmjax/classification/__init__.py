"""Classify texts: labels and texts enter, labels and probabilities leave.

This folder builds prompts, scores them, calibrates and fine-tunes. It knows nothing of tasks,
suites or the command line.
"""
