"""From examples to packed rows on disk.

A data configuration enters; a rows folder with its manifest and report leaves. This room never
loads jax.
"""
