"""The models: an encoder alone, with a head for words, and with a head for labels."""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from mlmjax.config.run import AdapterConfig
from mlmjax.errors import InputError, suggest_keywords
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.cpu import spread
from mlmjax.model.encoder import DEFAULT_OPTIONS, Encoder, Options, check_token_ids
from mlmjax.model.layers import ACTIVATIONS, LayerNorm, Linear, draw_weight, output_std, product
from mlmjax.parallel.sharding import leaf_path, named_leaves


@suggest_keywords
class ModernBertModel(nnx.Module):
    """The encoder without a head, such as an embedding model is."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, **options: Any):
        """Draw parameters with `rngs`; `options` are those of `encoder.Options`."""
        self.config = config
        self.options = Options(**options)
        self.model = Encoder(config, self.options, rngs)

    @property
    def dtype(self) -> Any:
        """The dtype of matrix products."""
        return self.options.dtype

    def encode(
        self,
        input_ids: ArrayLike,
        segment_ids: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> Any:
        """Encode `[batch, seq]` to `[batch, seq, hidden]`; see `Encoder` for the arguments."""
        return self.model(
            input_ids, segment_ids, position_ids, output_hidden_states=output_hidden_states
        )


class _ModernBert(ModernBertModel):
    """An encoder and the head before the last product, which both models with a head share."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(config, rngs=rngs, **options)
        self.head = PredictionHead(config, rngs)


@suggest_keywords
class ModernBertForMaskedLM(_ModernBert):
    """ModernBERT with the MLM head, whose decoder is the token embedding or a matrix of its own."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(config, rngs=rngs, **options)
        self.decoder = Decoder(config, rngs)

    def mlm_logits(self, hidden: jax.Array, vocabulary_ids: ArrayLike | None = None) -> jax.Array:
        """Map `[..., hidden]` to float32 logits `[..., vocab]`.

        With `vocabulary_ids` `[n]` only these words are scored: `[..., n]`. With `[batch, n]` each
        row of `[batch, hidden]` has words of its own.
        """
        with jax.named_scope("mlm_head"):
            own = self.decoder.weight
            words = (self.model.embeddings.tok_embeddings.weight if own is None else own)[...]
            bias = None if self.decoder.bias is None else self.decoder.bias[...]
            if vocabulary_ids is not None:
                rank = 2 if np.ndim(vocabulary_ids) == hidden.ndim == 2 else 1
                ids = check_token_ids(
                    "vocabulary_ids", vocabulary_ids, rank, self.config.vocab_size
                )
                words = jnp.take(words, ids, axis=0, mode="fill")
                bias = None if bias is None else jnp.take(bias, ids, mode="fill")
            hidden = self.head(hidden.astype(self.dtype))
            leading = "abcd"[: hidden.ndim - 1]
            rows = leading if words.ndim == 3 else ""
            logits = product(f"{leading}h,{rows}vh->{leading}v", hidden, words)
            if bias is None:
                return logits
            return logits + (spread(bias, logits) if bias.ndim == 1 else bias)

    def __call__(
        self,
        input_ids: ArrayLike,
        segment_ids: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
    ) -> jax.Array:
        """Map `[batch, seq]` to float32 logits `[batch, seq, vocab]`; see `Encoder`."""
        return self.mlm_logits(self.encode(input_ids, segment_ids, position_ids))


@suggest_keywords
class ModernBertForSequenceClassification(_ModernBert):
    """ModernBERT with one linear layer over each pooled text."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(config, rngs=rngs, **options)
        self.classifier = _make_classifier(config, rngs)

    def __call__(
        self,
        input_ids: ArrayLike,
        segment_ids: ArrayLike | None = None,
        *,
        segments: int | None = None,
    ) -> jax.Array:
        """Map `[batch, seq]` to float32 logits `[batch, num_labels]`.

        `config.classifier_pooling` takes the first token of each row that is not padding, or the
        mean over such tokens. With `segments` a row holds that many packed texts at most. The
        result is then `[batch, segments, num_labels]` for segments 1, 2, ..., each as if it was
        alone in a row, and meaningless where a row lacks that segment.
        """
        shape = jnp.shape(input_ids)
        owner = jnp.ones(shape, jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)
        if segments is None:
            members, positions = (owner != 0)[:, None], None
        else:
            members = owner[:, None] == jnp.arange(1, segments + 1, dtype=jnp.int32)[None, :, None]
            start = jnp.where(members, jnp.argmax(members, axis=2, keepdims=True), 0)
            start = jnp.sum(start, axis=1)
            positions = jnp.arange(shape[1], dtype=jnp.int32)[None] - start
        hidden = self.encode(input_ids, segment_ids, positions)
        with jax.named_scope("classifier"):
            if self.config.classifier_pooling == "cls":
                first = jnp.argmax(members, axis=2)
                pooled = jnp.take_along_axis(hidden, first[:, :, None], axis=1)
            else:
                total = product("bst,bth->bsh", members.astype(hidden.dtype), hidden)
                count = members.sum(axis=2)[:, :, None]
                count = jnp.maximum(count, 1).astype(total.dtype)
                pooled = (total / count).astype(self.dtype)
            logits = self.classifier(self.head(pooled))
            return logits[:, 0] if segments is None else logits


class PredictionHead(nnx.Module):
    """Dense layer, activation and norm before the decoder or the classifier."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        hidden = (config.hidden_size,)
        bias, std = config.classifier_bias, output_std(config)
        self.dense = Linear(config, hidden, hidden, bias=bias, std=std, rngs=rngs)
        self.norm = LayerNorm(config)
        self.activation = config.classifier_activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[..., hidden]` to the same shape and dtype."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(x)), x.dtype)


class Decoder(nnx.Module):
    """The decoder's own parameters: its optional bias, and `[vocab, hidden]` if it is not tied."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape, weight = (config.vocab_size, config.hidden_size), None
        if not config.tie_word_embeddings:
            weight = nnx.Param(draw_weight(config, shape, rngs, output_std(config)))
        self.weight = weight
        zeros = jnp.zeros(config.vocab_size, jnp.float32)
        self.bias = nnx.Param(zeros) if config.decoder_bias else None


def _make_classifier(config: ModelConfig, rngs: nnx.Rngs) -> Linear:
    inputs, outputs = (config.hidden_size,), (config.num_labels,)
    return Linear(config, inputs, outputs, bias=True, std=config.hidden_size**-0.5, rngs=rngs)


ADAPTER_WEIGHTS = (".lora_A.weight", ".lora_B.weight")
"""How the names of an adapter's matrices end."""

Model = ModernBertForMaskedLM | ModernBertForSequenceClassification | ModernBertModel
CLASSES: dict[str, type[Model]] = {
    cls.__name__: cls
    for cls in (ModernBertForMaskedLM, ModernBertForSequenceClassification, ModernBertModel)
}
SINGLE_LABEL: Literal["single_label_classification"] = "single_label_classification"


def parameters(model: nnx.Module) -> dict[str, Any]:
    """Return the parameters (or their shapes) by their names in a checkpoint."""
    return named_leaves(nnx.state(model, nnx.Param))


def abstract_model(name: str, config: ModelConfig, options: Options = DEFAULT_OPTIONS) -> Any:
    """Return the model of class `name` with shapes instead of arrays, so without their memory."""
    # No array is drawn, so any keys do. Counting them with `nnx.Rngs` would take half a second.
    rngs: Any = SimpleNamespace(params=lambda: jax.random.key(0))
    return nnx.eval_shape(lambda: CLASSES[name](config, rngs=rngs, **vars(options)))


def with_parameters(abstract: Any, values: Mapping[str, Any]) -> Any:
    """Return a model like `abstract` that holds the arrays of `values`, which may hold more."""
    graphdef, params = nnx.split(abstract)
    filled = jax.tree_util.tree_map_with_path(lambda path, _: values[leaf_path(path)], params)
    return nnx.merge(graphdef, filled)


def encoder_of(model: Model) -> ModernBertModel:
    """Return the encoder of a model, which shares its arrays."""
    config = replace(model.config, architectures=(ModernBertModel.__name__,))
    abstract = abstract_model(ModernBertModel.__name__, config, model.options)
    encoder: ModernBertModel = with_parameters(abstract, parameters(model))
    return encoder


def labelled_config(config: ModelConfig, labels: Sequence[str]) -> ModelConfig:
    """Return the configuration of a classification model; without labels, of a regression."""
    names = list(labels) or ["LABEL_0"]
    return replace(
        config,
        architectures=(ModernBertForSequenceClassification.__name__,),
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        problem_type=SINGLE_LABEL if labels else "regression",
    )


def with_classifier(
    model: Model, labels: Sequence[str], *, seed: int
) -> ModernBertForSequenceClassification:
    """Return a classification model of these labels with the encoder and the head of `model`.

    The decoder of a masked language model is dropped, and `seed` draws a new last layer, and a new
    head if the model has none. A
    classification model of exactly these labels keeps its last layer. Raises `InputError` for one
    of other labels.
    """
    config = labelled_config(model.config, labels)
    values = parameters(model)
    if not isinstance(model, ModernBertForSequenceClassification):
        with jax.transfer_guard("allow"):  # Flax moves its seed and constants implicitly.
            rngs = nnx.Rngs(seed)
            drawn = parameters(_make_classifier(config, rngs))
            values |= {f"classifier.{name}": leaf for name, leaf in drawn.items()}
            if not isinstance(model, _ModernBert):
                drawn = parameters(PredictionHead(config, rngs))
                values |= {f"head.{name}": leaf for name, leaf in drawn.items()}
    elif model.config.id2label != config.id2label:
        have, want = (
            ", ".join(map(repr, one.id2label.values()))[:200] for one in (model.config, config)
        )
        raise InputError(
            f"init_from: is a classification model of the labels {have}; the sources name {want}; "
            "give the same labels in the same order, or start from a masked language model"
        )
    name = ModernBertForSequenceClassification.__name__
    return with_parameters(abstract_model(name, config, model.options), values)


def with_adapter(
    model: Model, adapter: AdapterConfig, values: Mapping[str, Any] | None = None, *, seed: int = 0
) -> Model:
    """Return the model with an adapter; `values` are its matrices by the names of parameters.

    Without them `lora_A` is drawn uniformly from +-1 / sqrt(inputs), as PEFT does, and `lora_B` is
    0, so that the model answers as before; a model with the same kind of adapter is returned
    unchanged. Raises `InputError` for a model with another adapter.
    """
    if (own := model.config.adapter) is not None:
        if own.is_same(adapter) and values is None:
            return model
        raise InputError(
            f"adapter: the model has one already, of rank {own.rank} and alpha {own.alpha:g}; give "
            "the same, or the base, or save it merged (mlmjax.save_pretrained) and start from that"
        )
    config = replace(model.config, adapter=adapter)
    abstract = abstract_model(type(model).__name__, config, model.options)
    drawn = {
        name: _draw_adapter(name, leaf.shape, seed)
        for name, leaf in parameters(abstract).items()
        if name.endswith(ADAPTER_WEIGHTS) and values is None
    }
    return with_parameters(abstract, {**parameters(model), **drawn, **(values or {})})


def _draw_adapter(name: str, shape: tuple[int, ...], seed: int) -> jax.Array:
    # Drawn by numpy, so that every mesh and every version of JAX has the same numbers.
    if name.endswith(ADAPTER_WEIGHTS[1]):
        return jnp.asarray(np.zeros(shape, np.float32))
    bound = math.prod(shape[:-1]) ** -0.5
    drawn = np.random.default_rng([seed, zlib.crc32(name.encode())]).uniform(-bound, bound, shape)
    return jnp.asarray(drawn.astype(np.float32))


def merged(model: Model) -> Model:
    """Return the model with its adapter added to its weights; the model itself without one."""
    adapter = model.config.adapter
    if adapter is None:
        return model
    values = parameters(model)
    down, up = ADAPTER_WEIGHTS
    for name in [name for name in values if name.endswith(down)]:
        whole, low = name.removesuffix(down), np.asarray(values[name], np.float32)
        change = np.tensordot(low, np.asarray(values[whole + up], np.float32), axes=1)
        values[f"{whole}.weight"] = values[f"{whole}.weight"] + np.float32(adapter.scale) * change
    # These are no longer the weights that were read, though their norms are.
    provenance = model.config.provenance._replace(norms=-1)
    config = replace(model.config, adapter=None, provenance=provenance)
    return with_parameters(abstract_model(type(model).__name__, config, model.options), values)
