"""Tiny models with noise on every parameter; batches, losses and gradients for them."""

import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlmjax.model.architecture import ModelConfig
from mlmjax.parallel import sharding

TINY = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "local_attention": 8,
    "pad_token_id": 0,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1),
}
BIASES = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")


def config_of(**changes):
    return ModelConfig(**{**TINY, **changes})


def noise(name, shape, scale):
    """Return noise that depends on nothing but the parameter's name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return scale * rng.normal(size=shape).astype(np.float32)


def build(kind, config, scale=0.3, **options):
    """Return a model with noise on every parameter, norms and biases included."""
    model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0), **options))
    graphdef, params = nnx.split(model)

    def shaken(path, leaf):
        name = sharding.leaf_path(path)
        ones = 1.0 if name.endswith("norm.weight") else 0.0
        return jnp.asarray(ones + noise(name, leaf.shape, scale))

    return nnx.merge(graphdef, jax.tree.map_with_path(shaken, params))


def padded_batch(vocab_size, lengths=(40, 23, 31), seed=0):
    """Return ids, a mask (full, padded right, padded left) and targets (-100: not a target)."""
    rng = np.random.default_rng(seed)
    width = max(lengths)
    ids = rng.integers(0, vocab_size, (len(lengths), width), dtype=np.int32)
    mask = np.ones_like(ids)
    mask[1, lengths[1] :] = 0
    mask[2, : width - lengths[2]] = 0
    chosen = (rng.random(ids.shape) < 0.3) & (mask == 1)
    targets = np.where(chosen, rng.integers(0, vocab_size, ids.shape), -100)
    return ids, mask, targets


def cross_entropy(logits, targets):
    safe = jnp.maximum(targets, 0)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), safe[..., None], axis=-1)[..., 0]
    return -jnp.where(targets >= 0, chosen, 0.0).sum() / (targets >= 0).sum()


def loss_and_gradients(model, ids, mask, targets, *, compiled=False):
    """Return loss, logits and gradients.

    Operation by operation unless `compiled`: models of the same small shapes then share all their
    operations, which takes a tenth of compiling each model.
    """
    graphdef, params = nnx.split(model)

    @partial(jax.value_and_grad, has_aux=True)
    def run(params):
        logits = nnx.merge(graphdef, params)(ids, mask)
        return cross_entropy(logits, targets), logits

    (loss, logits), grads = (jax.jit(run) if compiled else run)(params)
    return float(loss), np.asarray(logits), sharding.named_leaves(grads)


def run_jitted(model, *inputs):
    """Return the logits from a compiled program."""
    graphdef, params = nnx.split(model)
    return jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))(params, *inputs)
