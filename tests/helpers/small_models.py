"""Models small enough for every test to score with."""

import jax
import numpy as np
from flax import nnx

from mlmjax.model.architecture import ModelConfig


def small_config(**changes):
    return ModelConfig(
        **{
            "vocab_size": 50368,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 160,
            "local_attention": 16,
            **changes,
        }
    )


def noisy(model, scale=0.3):
    """Add noise to every parameter, so that no result is right only because one is 0 or 1."""
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree.flatten(state)
    rng = np.random.default_rng(7)
    leaves = [leaf + scale * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
