"""A training run in its folder: start, resume, loop, validation, log and export.

A run configuration enters; a run folder with checkpoints and an export leaves.
"""
