"""Decode every file a person writes strictly: runs, data, tasks and suites.

TOML enters; frozen, typed tables leave. This folder never loads jax and acts on nothing it decodes.
"""
