"""Score with a model: label probabilities, likelihoods of texts, filled masks.

A model and texts enter; numpy arrays leave. This folder never trains.
"""
