"""The encoder: from token ids to one vector per token.

Attributes carry the names of the checkpoint's parameters. Parameters, norms, softmax and rotary
positions are float32. Matrix products take the compute dtype and accumulate in float32.
Source: "Smarter, Better, Faster, Longer" (arXiv 2412.13663) and transformers 5.23.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from mlmjax.config.run import SPLASH_BLOCKS, Remat
from mlmjax.errors import InputError, suggest_keywords
from mlmjax.model.architecture import LOCAL, ModelConfig
from mlmjax.model.attention import IMPLEMENTATIONS, attend
from mlmjax.model.cpu import compute_once
from mlmjax.model.layers import ACTIVATIONS, LayerNorm, Linear, draw_weight, output_std
from mlmjax.parallel.sharding import constrain

Rope = tuple[jax.Array, jax.Array]
"""Cosines and sines of the rotary positions, each `[batch, 1, seq, head_dim / 2]`."""
Attend = Callable[..., jax.Array]
"""`attention.attend` with the window of a layer and the options of the model."""

# Activations kept for the backward pass. "dots" keeps the outputs of matrix products, "layer" only
# the input of each layer.
_STORED = {"dots": jax.checkpoint_policies.save_only_these_names("product")}


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model computes what its configuration describes.

    `dtype` is float32 or bfloat16, by name or type. `attention` is an implementation of
    `attention.attend`. `remat` is what the backward pass computes again: "none", "dots" (all but
    matrix products) or "layer" (all but the input of each layer). `splash_blocks` are the blocks of
    the TPU kernels in global and in local layers. Raises `InputError`.
    """

    dtype: Any = "float32"
    attention: str = "auto"
    remat: str = "none"
    splash_blocks: tuple[int, int] = SPLASH_BLOCKS

    def __post_init__(self) -> None:
        for name, known in (("attention", IMPLEMENTATIONS), ("remat", get_args(Remat))):
            found = getattr(self, name)
            if found not in known:
                raise InputError(f"{name}: found {found!r}; expected one of {', '.join(known)}")
        if self.dtype not in ("float32", "bfloat16", jnp.float32, jnp.bfloat16):
            raise InputError(f"dtype: found {self.dtype!r}; expected 'float32' or 'bfloat16'")
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))


DEFAULT_OPTIONS = Options()


class Encoder(nnx.Module):
    """Embeddings, the stack of layers and the final norm."""

    def __init__(self, config: ModelConfig, options: Options, rngs: nnx.Rngs):
        self.config, self.options = config, options
        self.embeddings = Embeddings(config, rngs)
        self.layers = nnx.List(
            [Layer(config, index, rngs) for index in range(config.num_hidden_layers)]
        )
        self.final_norm = LayerNorm(config)

    def __call__(
        self,
        input_ids: ArrayLike,
        segment_ids: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> Any:
        """Encode `[batch, seq]` to `[batch, seq, hidden]` in the compute dtype.

        Tokens with the same non-zero segment id attend to each other; 0 is padding, so a Hugging
        Face `attention_mask` is a valid value. None means one segment and no padding. Local windows
        count positions in the row; `position_ids` (default 0, 1, 2, ...) are for rotary positions
        only. Values at padding are finite but meaningless. With `output_hidden_states` the result
        is `(hidden, states)`: the embeddings, then the output of each layer, the last one after the
        final norm.

        Raises `InputError` for arrays of the wrong rank, shape or dtype, and for ids outside the
        vocabulary. Traced ids outside the vocabulary give NaN instead.
        """
        config, kinds = self.config, self.config.layer_types
        ids = check_token_ids("input_ids", input_ids, 2, config.vocab_size)
        segments = _check_like_ids("segment_ids", segment_ids, ids)
        positions = _check_like_ids("position_ids", position_ids, ids)
        if positions is None:
            positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :]
        ropes: dict[str, Rope] = {
            kind: _rope_tables(positions, config.head_dim, config.rope_theta(kind))
            for kind in sorted(set(kinds))
        }
        with jax.named_scope("embeddings"):
            hidden = _shard_rows(self.embeddings(ids, self.options.dtype))
        states = [hidden]
        scanned, period = range(0), 0
        # Without remat a scan would store more than unrolled layers do.
        if self.options.remat != "none" and not output_hidden_states:
            scanned, period = _find_periods(kinds)
        for index, kind in enumerate(kinds):
            if index not in scanned:
                with jax.named_scope(f"layer_{index}"):
                    hidden = self._forward(self.layers[index], kind)(hidden, ropes[kind], segments)
            elif index == scanned.start:
                with jax.named_scope(f"layers_{scanned[0]}_to_{scanned[-1]}"):
                    hidden = self._scan(scanned, period, hidden, ropes, segments)
            states.append(hidden)
        with jax.named_scope("final_norm"):
            hidden = self.final_norm(hidden, self.options.dtype)
        return (hidden, (*states[:-1], hidden)) if output_hidden_states else hidden

    def _forward(
        self, layer: "Layer", kind: str
    ) -> Callable[[jax.Array, Rope, jax.Array | None], jax.Array]:
        """Return the forward pass of one layer, with its recomputation."""
        is_local = kind == LOCAL
        attend_here = partial(
            attend,
            window=self.config.window if is_local else None,
            implementation=self.options.attention,
            block=self.options.splash_blocks[is_local],
        )

        forward = partial(layer, attend_here=attend_here)
        if self.options.remat == "none":
            return forward
        return jax.checkpoint(forward, policy=_STORED.get(self.options.remat))

    def _scan(
        self,
        scanned: range,
        period: int,
        hidden: jax.Array,
        ropes: dict[str, Rope],
        segment_ids: jax.Array | None,
    ) -> jax.Array:
        """Apply equal periods of layers as one loop, so that only one period is compiled."""
        graphs, stacked = [], []
        for first in range(scanned.start, scanned.start + period):
            parts = [nnx.split(self.layers[i]) for i in range(first, scanned.stop, period)]
            graphs.append(parts[0][0])
            stacked.append(jax.tree.map(lambda *x: jnp.stack(x), *(state for _, state in parts)))
        kinds = self.config.layer_types[scanned.start : scanned.start + period]

        def body(hidden: jax.Array, states: Any) -> tuple[jax.Array, None]:
            for graph, state, kind in zip(graphs, states, kinds, strict=True):
                forward = self._forward(nnx.merge(graph, state), kind)
                hidden = forward(hidden, ropes[kind], segment_ids)
            return hidden, None

        return jax.lax.scan(body, hidden, stacked)[0]


def _find_periods(kinds: Sequence[str]) -> tuple[range, int]:
    """Return the layers that form equal periods, and the period; empty if they are too few.

    They have to be more than half of the layers. Layer 0 has no attention norm and stays out.

    >>> _find_periods(("full", "local", "local", "full", "local", "local", "full", "local"))
    (range(1, 7), 3)
    """
    best, best_period = range(0), 0
    for period in range(1, len(kinds) // 2 + 1):
        end = 1 + period
        while end < len(kinds) and kinds[end] == kinds[end - period]:
            end += 1
        repeats = (end - 1) // period
        if repeats > 1 and period * repeats > max(len(best), len(kinds) // 2):
            best, best_period = range(1, 1 + period * repeats), period
    return best, best_period


class Embeddings(nnx.Module):
    """Token vectors and their norm; there is no position embedding."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.tok_embeddings = Embedding(config, rngs)
        self.norm = LayerNorm(config)

    def __call__(self, input_ids: jax.Array, dtype: Any) -> jax.Array:
        """Map `[batch, seq]` to `[batch, seq, hidden]`."""
        return self.norm(self.tok_embeddings(input_ids), dtype)


class Embedding(nnx.Module):
    """One vector per token; the MLM decoder reads the same matrix."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.weight = nnx.Param(draw_weight(config, shape, rngs))
        self.pad_token_id = config.pad_token_id

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """Look up `[batch, seq]`; an id outside the vocabulary gives NaN."""
        # The table is sharded along hidden by the axis fsdp. Each device looks up its columns for
        # the rows of "data", and then columns are exchanged for rows: "batch" is data and fsdp
        # together. Otherwise the compiler may gather all rows on all devices.
        input_ids = constrain(input_ids, "data", None)
        rows = jnp.take(self.weight[...], input_ids, axis=0, mode="fill")
        rows = constrain(rows, "data", None, "fsdp")
        if self.pad_token_id is not None:
            # The padding vector gets no gradient, like `padding_idx` in torch.
            is_pad = (input_ids == self.pad_token_id)[..., None]
            rows = jnp.where(is_pad, jax.lax.stop_gradient(rows), rows)
        return _shard_rows(constrain(rows, "data", None, "fsdp"))


class Layer(nnx.Module):
    """One pre-norm block; the first layer of a model has no attention norm."""

    def __init__(self, config: ModelConfig, index: int, rngs: nnx.Rngs):
        self.attn_norm = LayerNorm(config) if index else None
        self.attn = Attention(config, rngs)
        self.mlp_norm = LayerNorm(config)
        self.mlp = GatedMLP(config, rngs)

    def __call__(
        self, x: jax.Array, rope: Rope, segment_ids: jax.Array | None, attend_here: Attend
    ) -> jax.Array:
        """Map `[batch, seq, hidden]` to the same shape."""
        normed = x if self.attn_norm is None else self.attn_norm(x, x.dtype)
        with jax.named_scope("attention"):
            x = _shard_rows(_added(x, self.attn(normed, rope, segment_ids, attend_here)))
            x = checkpoint_name(compute_once(x, rope), "product")
        with jax.named_scope("mlp"):
            x = _shard_rows(_added(x, self.mlp(self.mlp_norm(x, x.dtype))))
            return compute_once(x, rope)


class Attention(nnx.Module):
    """Multi-head self-attention with rotary positions, global or within a window."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        hidden, heads = (config.hidden_size,), (config.num_attention_heads, config.head_dim)
        make = partial(Linear, config, bias=config.attention_bias, rngs=rngs)
        self.Wqkv = make(hidden, (3, *heads), name="attn.Wqkv")
        self.Wo = make(heads, hidden, std=output_std(config), name="attn.Wo")

    def __call__(
        self, x: jax.Array, rope: Rope, segment_ids: jax.Array | None, attend_here: Attend
    ) -> jax.Array:
        """Map `[batch, seq, hidden]` to float32 of the same shape."""
        query, key, value = jnp.transpose(self.Wqkv(x), (2, 0, 3, 1, 4))
        query, key, value = (
            checkpoint_name(
                constrain(array.astype(x.dtype), "batch", "tensor", None, None), "product"
            )
            for array in (_rotate(query, rope), _rotate(key, rope), value)
        )
        mixed = attend_here(query, key, value, segment_ids)
        return self.Wo(checkpoint_name(jnp.transpose(mixed, (0, 2, 1, 3)), "product"))


class GatedMLP(nnx.Module):
    """The gated feed-forward block: `Wo(activation(a) * b)`, where `Wi` gives a and b."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        hidden, width = config.hidden_size, config.intermediate_size
        make = partial(Linear, config, bias=config.mlp_bias, rngs=rngs)
        self.Wi = make((hidden,), (2, width), name="mlp.Wi")
        self.Wo = make((width,), (hidden,), std=output_std(config), name="mlp.Wo")
        self.activation = config.hidden_activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, seq, hidden]` to float32 of the same shape."""
        both = constrain(self.Wi(x).astype(x.dtype), "batch", None, None, "tensor")
        both = checkpoint_name(both, "product").astype(jnp.float32)
        gated = ACTIVATIONS[self.activation](both[..., 0, :]) * both[..., 1, :]
        return self.Wo(gated.astype(x.dtype))


def _added(x: jax.Array, change: jax.Array) -> jax.Array:
    """Add a float32 change to the residual stream, and round the sum once."""
    return (x.astype(jnp.float32) + change).astype(x.dtype)


def _rope_tables(position_ids: jax.Array, head_dim: int, theta: float) -> Rope:
    """Compute cosines and sines in float32 (RoFormer, arXiv 2104.09864)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    angles = position_ids[:, None, :, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotate float32 `[batch, heads, seq, head_dim]`; the two halves of a head form the pairs."""
    cos, sin = rope
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _shard_rows(hidden: jax.Array) -> jax.Array:
    """Shard the rows of `[batch, seq, hidden]` over the devices that share a batch."""
    return constrain(hidden, "batch", None, None)


def check_token_ids(name: str, values: ArrayLike, rank: int, vocab_size: int) -> jax.Array:
    """Return token ids as unsigned integers; raises `InputError` for anything else."""
    ids = jnp.asarray(values)
    if ids.ndim != rank or not jnp.issubdtype(ids.dtype, jnp.integer):
        expected = f"whole numbers {['[n]', '[batch, seq]'][rank - 1]}"
        raise InputError(f"{name}: found {ids.dtype} {list(ids.shape)}; expected {expected}")
    if not isinstance(values, jax.core.Tracer) and ids.size:
        # In numpy, because jit also traces jax operations on known arrays.
        known = np.asarray(values)
        low, high = int(known.min()), int(known.max())
        if low < 0 or high >= vocab_size:
            raise InputError(
                f"{name}: found {low if low < 0 else high}; expected ids from 0 to "
                f"{vocab_size - 1} (does the tokenizer belong to this model?)"
            )
    # A traced negative id becomes too large, where a signed one would count from the end.
    return ids.astype(jnp.uint32)


def _check_like_ids(name: str, values: ArrayLike | None, input_ids: jax.Array) -> jax.Array | None:
    if values is None:
        return None
    array = jnp.asarray(values)
    whole = jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == bool
    if array.shape != input_ids.shape or not whole:
        raise InputError(
            f"{name}: found {array.dtype} {list(array.shape)}; expected whole numbers "
            f"{list(input_ids.shape)}, as input_ids"
        )
    return array.astype(jnp.int32)
