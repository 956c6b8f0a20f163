"""Fill many masks step by step, and measure how masks depend on each other.

A model and texts with masks enter; texts and log probabilities leave. This folder never trains.
"""
