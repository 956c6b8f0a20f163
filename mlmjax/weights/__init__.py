"""Weights to and from disk: Hugging Face folders and Orbax checkpoints, both verified.

A folder or hub id enters and a model leaves, or the other way round. Only this folder knows Hugging
Face names and layouts, and only this folder knows Orbax.
"""
