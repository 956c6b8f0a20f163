"""Turn examples into packed rows on disk.

A data configuration enters; a rows folder with its manifest and report leaves. This folder
never loads jax.
"""
