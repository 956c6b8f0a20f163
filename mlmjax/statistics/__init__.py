"""Compute numbers about answers and probabilities.

Arrays of answers or log probabilities enter; figures, intervals and calibrations leave. This folder
uses numpy and scipy only: no jax, no models, no files, no pictures.
"""
