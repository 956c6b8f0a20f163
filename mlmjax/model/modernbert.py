"""ModernBERT in Flax NNX: modules hold the parameters, the forward pass is plain JAX.

Source: "Smarter, Better, Faster, Longer" (arXiv 2412.13663) and transformers 5.23, whose parameter
names the attributes carry. Parameters, norms, softmax and RoPE are float32; matrix products take
the compute dtype and accumulate in float32.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from mlmjax.config.run import SPLASH_BLOCKS, Remat
from mlmjax.errors import InputError
from mlmjax.model.architecture import LOCAL, ModelConfig
from mlmjax.model.attention import IMPLEMENTATIONS
from mlmjax.model.cpu import _spread
from mlmjax.model.encoder import (
    _STORED,
    DecoderBias,
    Encoder,
    Layer,
    PredictionHead,
    _apply_layer,
    _check_inputs,
    _repetition,
    _rope_tables,
    _token_ids,
    cut_rows,
)
from mlmjax.model.layers import make_classifier, product
from mlmjax.parallel.sharding import leaf_path

REMAT = get_args(Remat)


class _ModernBert(nnx.Module):
    """What both models share: the encoder, the head, and how they compute."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        attention: str = "auto",
        remat: str = "none",
    ):
        for name, found, known in (
            ("attention", attention, IMPLEMENTATIONS),
            ("remat", remat, REMAT),
        ):
            if found not in known:
                raise InputError(f"{name}: found {found!r}; expected one of {', '.join(known)}")
        self.dtype = jnp.dtype(dtype)
        if self.dtype not in (jnp.float32, jnp.bfloat16):
            raise InputError(f"dtype: found {self.dtype}; expected float32 or bfloat16")
        self.config = config
        self.attention = attention
        self.remat = remat
        self.splash_blocks = SPLASH_BLOCKS
        self.model = Encoder(config, rngs)
        self.head = PredictionHead(config, rngs)

    def encode(
        self,
        input_ids: ArrayLike,
        segment_ids: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> Any:
        """Encode `[batch, seq]` to `[batch, seq, hidden]`, after the final norm, in `self.dtype`.

        Equal non-zero `segment_ids` attend to each other and 0 is padding, so a Hugging Face
        `attention_mask` is a valid value; None means one segment and no padding. Local windows
        count rows of the input; `position_ids` (default 0, 1, 2, ...) only turn the rotary
        embedding. Values at padding are finite, otherwise unspecified. With
        `output_hidden_states` the result is `(hidden, states)`, states being the embeddings, then
        the output of each layer, the last of them after the final norm.

        Raises `InputError` for arrays of the wrong rank, shape or dtype, and for ids outside the
        vocabulary; traced ids cannot be looked at, and give NaN.
        """
        input_ids, segment_ids, position_ids = _check_inputs(
            input_ids, segment_ids, position_ids, self.config.vocab_size
        )
        config = self.config
        ropes = {
            kind: _rope_tables(position_ids, config.head_dim, config.rope_theta(kind))
            for kind in sorted(set(config.layer_types))
        }
        with jax.named_scope("embeddings"):
            hidden = cut_rows(self.model.embeddings(input_ids, self.dtype))
        states = [hidden]
        scanned, period = range(0), 0
        # A loop keeps of a layer all that is not computed anew, the compiler less of single layers.
        if self.remat != "none" and not output_hidden_states:
            scanned, period = _repetition(config.layer_types)
        index = 0
        while index < config.num_hidden_layers:
            if index in scanned:
                with jax.named_scope(f"layers_{scanned[0]}_to_{scanned[-1]}"):
                    hidden = self._scan(scanned, period, hidden, ropes, segment_ids)
                index = scanned.stop
                continue
            with jax.named_scope(f"layer_{index}"):
                layer, kind = self.model.layers[index], config.layer_types[index]
                hidden = self._forward(layer, kind)(hidden, ropes[kind], segment_ids)
            states.append(hidden)
            index += 1
        with jax.named_scope("final_norm"):
            hidden = self.model.final_norm(hidden, self.dtype)
        return (hidden, (*states[:-1], hidden)) if output_hidden_states else hidden

    def _forward(self, layer: Layer, kind: str) -> Any:
        """Return `(hidden, rope, segment_ids) -> hidden` of one layer."""
        is_local = kind == LOCAL
        forward = partial(
            _apply_layer,
            layer,
            self.config.window if is_local else None,
            self.attention,
            self.splash_blocks[is_local],
        )
        if self.remat == "none":
            return forward
        return jax.checkpoint(forward, policy=_STORED.get(self.remat))

    def _scan(
        self,
        scanned: range,
        period: int,
        hidden: jax.Array,
        ropes: dict[str, tuple[jax.Array, jax.Array]],
        segment_ids: jax.Array | None,
    ) -> jax.Array:
        """Apply equal periods of layers as one loop: the compiler sees one period of them."""
        graphs, stacked = [], []
        for place in range(scanned.start, scanned.start + period):
            parts = [nnx.split(self.model.layers[i]) for i in range(place, scanned.stop, period)]
            graphs.append(parts[0][0])
            stacked.append(jax.tree.map(lambda *x: jnp.stack(x), *(state for _, state in parts)))
        kinds = self.config.layer_types[scanned.start :]

        def body(hidden: jax.Array, states: Any) -> tuple[jax.Array, None]:
            for graph, state, kind in zip(graphs, states, kinds, strict=False):
                forward = self._forward(nnx.merge(graph, state), kind)
                hidden = forward(hidden, ropes[kind], segment_ids)
            return hidden, None

        return jax.lax.scan(body, hidden, stacked)[0]


class ModernBertForMaskedLM(_ModernBert):
    """ModernBERT with the MLM head, whose decoder is the token embedding plus a bias."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(config, rngs=rngs, **options)
        self.decoder = DecoderBias(config)

    def mlm_logits(self, hidden: jax.Array, vocabulary_ids: ArrayLike | None = None) -> jax.Array:
        """Map `[..., hidden]` to float32 logits `[..., vocab]`.

        With `vocabulary_ids` `[n]` only these words are scored: `[..., n]`.
        """
        with jax.named_scope("mlm_head"):
            words = self.model.embeddings.tok_embeddings.weight[...]
            bias = None if self.decoder.bias is None else self.decoder.bias[...]
            if vocabulary_ids is not None:
                ids = _token_ids("vocabulary_ids", vocabulary_ids, 1, self.config.vocab_size)
                words = jnp.take(words, ids, axis=0, mode="fill")
                bias = None if bias is None else jnp.take(bias, ids, mode="fill")
            hidden = self.head(hidden.astype(self.dtype))
            leading = "abcd"[: hidden.ndim - 1]
            logits = product(f"{leading}h,vh->{leading}v", hidden, words)
            return logits if bias is None else logits + _spread(bias, logits)

    def __call__(
        self,
        input_ids: ArrayLike,
        segment_ids: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
    ) -> jax.Array:
        """Map `[batch, seq]` to float32 logits `[batch, seq, vocab]`; see `encode`."""
        return self.mlm_logits(self.encode(input_ids, segment_ids, position_ids))


class ModernBertForSequenceClassification(_ModernBert):
    """ModernBERT with one linear layer over each pooled text."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(config, rngs=rngs, **options)
        self.classifier = make_classifier(config, rngs)

    def __call__(
        self,
        input_ids: ArrayLike,
        segment_ids: ArrayLike | None = None,
        *,
        segments: int | None = None,
    ) -> jax.Array:
        """Map `[batch, seq]` to float32 logits `[batch, num_labels]`.

        Pooling is the first token of each row that is no padding, or the mean over those tokens,
        by `config.classifier_pooling`. Rows of several packed texts, `segments` at most, give
        `[batch, segments, num_labels]`: those of segments 1, 2, ... (unspecified where a row has
        none of that number), each as if it stood alone.
        """
        shape = jnp.shape(input_ids)
        owner = jnp.ones(shape, jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)
        if segments is None:
            members, positions = (owner != 0)[:, None], None
        else:
            members = owner[:, None] == jnp.arange(1, segments + 1, dtype=jnp.int32)[None, :, None]
            start = jnp.sum(members * jnp.argmax(members, axis=2, keepdims=True), axis=1)
            positions = jnp.arange(shape[1], dtype=jnp.int32)[None] - start
        hidden = self.encode(input_ids, segment_ids, positions)
        with jax.named_scope("classifier"):
            if self.config.classifier_pooling == "cls":
                first = jnp.argmax(members, axis=2)
                pooled = jnp.take_along_axis(hidden, first[:, :, None], axis=1)
            else:
                total = product("bst,bth->bsh", members.astype(hidden.dtype), hidden)
                count = members.sum(axis=2)[:, :, None]
                pooled = (total / jnp.maximum(count, 1)).astype(self.dtype)
            logits = self.classifier(self.head(pooled))
            return logits[:, 0] if segments is None else logits


Model = ModernBertForMaskedLM | ModernBertForSequenceClassification
CLASSES: dict[str, type[Model]] = {
    cls.__name__: cls for cls in (ModernBertForMaskedLM, ModernBertForSequenceClassification)
}


def parameters(model: Model) -> dict[str, Any]:
    """Return the parameters of a model (or of an abstract one) by their names in a checkpoint."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.state(model, nnx.Param))
    return {leaf_path(path): leaf for path, leaf in leaves}


def abstract_model(
    name: str, config: ModelConfig, *, dtype: str = "float32", attention: str = "auto"
) -> Model:
    """Return the model of class `name` with shapes in the place of arrays: no memory is taken."""
    if str(dtype) not in ("float32", "bfloat16"):
        raise InputError(f"dtype: found {dtype!r}; expected 'float32' or 'bfloat16'")
    # Whatever the keys: no array is drawn. Having flax count them would take half a second.
    rngs: Any = SimpleNamespace(params=lambda: jax.random.key(0))
    return nnx.eval_shape(
        lambda: CLASSES[name](config, rngs=rngs, dtype=jnp.dtype(dtype), attention=attention)
    )


SINGLE_LABEL, REGRESSION = "single_label_classification", "regression"


def labelled_config(config: ModelConfig, labels: Sequence[str]) -> ModelConfig:
    """Return the configuration of a classification model of these labels; none: a regression."""
    names = list(labels) or ["LABEL_0"]
    return replace(
        config,
        architectures=(ModernBertForSequenceClassification.__name__,),
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        problem_type=SINGLE_LABEL if labels else REGRESSION,
    )


def with_classifier(
    model: ModernBertForMaskedLM | ModernBertForSequenceClassification,
    labels: Sequence[str],
    *,
    seed: int,
) -> ModernBertForSequenceClassification:
    """Return a classification model of these labels on the encoder and the head of `model`.

    A masked language model loses its decoder and gets a new last layer, drawn by `seed`; a
    classification model of just these labels goes on with the one it has. Raises `InputError` for
    one of other labels.
    """
    config = labelled_config(model.config, labels)
    if isinstance(model, ModernBertForSequenceClassification):
        found = model.config.id2label
        if found != config.id2label:
            raise InputError(
                f"init_from: is a classification model of the labels {_listed(found)}; the sources "
                f"name {_listed(config.id2label)}; give the same labels in the same order, or "
                "start from a masked language model"
            )
        model.config = config
        return model
    result: Any = nnx.eval_shape(
        lambda: ModernBertForSequenceClassification(
            config, rngs=nnx.Rngs(0), dtype=model.dtype, attention=model.attention
        )
    )
    result.model, result.head = model.model, model.head
    result.classifier = make_classifier(config, nnx.Rngs(seed))
    return result


def _listed(labels: Any) -> str:
    return ", ".join(map(repr, (labels or {}).values()))[:200]
