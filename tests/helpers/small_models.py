"""Models small enough for every test to score with."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from noisy_models import build

from mlmjax.model.architecture import ModelConfig
from mlmjax.model.modernbert import ModernBertForMaskedLM


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


def small_model(kind=ModernBertForMaskedLM, scale=0.3, **changes):
    """Return a model with noise on every parameter; nothing is compiled for it."""
    return build(kind, small_config(**changes), scale)


def noisy(model, scale=0.3):
    """Add noise to every parameter, so that no result is right only because one is 0 or 1."""
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(7)

    def shaken(leaf):
        return jnp.asarray(np.asarray(leaf) + scale * rng.standard_normal(leaf.shape, np.float32))

    return nnx.merge(graphdef, jax.tree.map(shaken, state))
