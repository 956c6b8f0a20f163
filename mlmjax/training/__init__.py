"""Training a model: the train state and its steps, losses, optimizers, fine-tuning in memory.

A model and batches enter; a trained state leaves. This folder knows no files; `run` does.
"""
