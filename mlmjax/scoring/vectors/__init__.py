"""Vectors of texts: one per text for search and clustering, and the states of every layer.

A model and texts enter; arrays and files of vectors leave. This folder never trains.
"""
