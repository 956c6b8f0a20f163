"""Load what a run starts from: a model and a tokenizer that fit each other and the run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from mlmjax.config.run import RunConfig
from mlmjax.data.contamination import TrainingManifest, read_training_manifest
from mlmjax.errors import InputError
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.encoder import Options
from mlmjax.model.modernbert import (
    Model,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    abstract_model,
    labelled_config,
    merged,
    with_adapter,
    with_classifier,
)
from mlmjax.parallel.sharding import parameter_sharding, place
from mlmjax.storage import CONFIG, read_json
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.weights import hub, pretrained

PUBLISHED: dict[str, dict[str, Any]] = {
    "answerdotai/ModernBERT-base": {"classifier_pooling": "mean"},
    "answerdotai/ModernBERT-large": {
        "classifier_pooling": "mean",
        "hidden_size": 1024,
        "intermediate_size": 2624,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
}
PUBLISHED["answerdotai/ModernBERT-Large-Instruct"] = PUBLISHED["answerdotai/ModernBERT-large"]
"""The config.json of published models, without the default values, so that none is fetched."""

DROPOUTS = ("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout")


def load_start(config: RunConfig) -> tuple[Model, Tokenizer, TrainingManifest | None]:
    """Load the model of `init_from`, or describe that of `[model]` without its weights.

    Returns the model, its tokenizer, and what the model of `init_from` was trained on. With
    `head = "classification"` the model has the labels of the sources. Raises `InputError` for a
    model that this run cannot train, and for a tokenizer of another model.
    """
    model: Any
    history = None
    if config.init_from is None:
        where, tokenizer = "[model]", load_tokenizer(config)
        model = _described(config, tokenizer)
    else:
        where = config.init_from
        folder = hub.fetch(where, revision=config.revision)
        # Without the folder: an adapter points to a hub id by its name and commit.
        model, tokenizer = pretrained.load_pretrained(
            where, revision=config.revision, **_options(config)
        )
        if config.adapter is None:
            model = merged(model)  # all of it is trained
        history = read_training_manifest(folder)
        if config.tokenizer is not None or config.anchor is not None:
            tokenizer = load_tokenizer(config)
        if config.head == "classification":
            model = with_classifier(model, config.label_names, seed=config.seed)
        elif not isinstance(model, ModernBertForMaskedLM):
            raise InputError(
                f"{where}: is a {type(model).__name__}; this training needs a "
                f"{ModernBertForMaskedLM.__name__}, or head = 'classification'"
            )
    if config.adapter is not None:
        model = with_adapter(model, config.adapter, seed=config.seed)
    _check_trainable(config, where, model.config)
    pretrained.check_tokenizer(Path(where), model.config, model.config.to_hf(), tokenizer)
    return model, tokenizer, history


def describe_start(config: RunConfig) -> Model:
    """Return the model of `load_start` with shapes instead of weights, from its configuration.

    Models of `PUBLISHED` need neither a folder nor the hub. Raises `InputError` as `load_start`.
    """
    where = config.init_from
    if where is None:
        model = _described(config, load_tokenizer(config))
    elif where in PUBLISHED and not Path(where).is_dir():
        model = _abstract(config, ModelConfig.from_hf(PUBLISHED[where]))
    else:
        folder = hub.fetch(where, revision=config.revision, weights=False)
        model = _abstract(config, pretrained.read_config(folder, read_json(folder, CONFIG)))
    _check_trainable(config, where or "[model]", model.config)
    return model


def load_tokenizer(config: RunConfig) -> Tokenizer:
    """Load the tokenizer of a run without its model."""
    if config.init_from is None or config.tokenizer is not None:
        tokenizer = Tokenizer.from_pretrained(config.tokenizer)
    else:
        folder = hub.fetch(config.init_from, revision=config.revision, weights=False)
        tokenizer = pretrained.read_tokenizer(folder)
    return tokenizer if config.anchor is None else tokenizer.with_anchor(config.anchor)


def _described(config: RunConfig, tokenizer: Tokenizer) -> Any:
    """Return the model of `[model]`, whose default ids are those of the tokenizer."""
    defaults = {
        "vocab_size": -(-tokenizer.vocab_size // 64) * 64,
        "pad_token_id": tokenizer.pad_id,
        **dict.fromkeys(("bos_token_id", "cls_token_id"), tokenizer.cls_id),
        **dict.fromkeys(("eos_token_id", "sep_token_id"), tokenizer.sep_id),
    }
    return _abstract(config, ModelConfig.from_hf(defaults | dict(config.model or {}), strict=True))


def _abstract(config: RunConfig, architecture: ModelConfig) -> Any:
    """Return the model of an architecture, the run's head and adapter, with shapes as weights."""
    kind: type = ModernBertForMaskedLM
    architecture = replace(architecture, adapter=config.adapter)
    if config.head == "classification":
        architecture = labelled_config(architecture, config.label_names)
        kind = ModernBertForSequenceClassification
    return abstract_model(kind.__name__, architecture, Options(**_options(config)))


def _options(config: RunConfig) -> dict[str, Any]:
    return {
        name: getattr(config, name) for name in ("dtype", "attention", "remat", "splash_blocks")
    }


def _check_trainable(config: RunConfig, where: str, architecture: ModelConfig) -> None:
    """Raise `InputError` for a model that this run cannot train."""
    longest = architecture.max_position_embeddings
    if config.data.seq_length > longest:
        raise InputError(
            f"data.seq_length: found {config.data.seq_length}; the model takes at most {longest} "
            "positions (max_position_embeddings)"
        )
    for name in DROPOUTS[: 3 if config.head == "mlm" else 4]:
        if rate := getattr(architecture, name):
            raise InputError(
                f"{where}: {name} is {rate}; training has no dropout, so set it to 0 in the "
                "model's configuration"
            )


def initial_parameters(config: RunConfig, model: Any, params: Any, mesh: Mesh) -> Any:
    """Put the loaded parameters, or those of a new model, on the mesh."""
    sharding = parameter_sharding(mesh, params)
    if config.init_from is None:
        # Drawn on the host: the same numbers on every mesh, no whole copy on any device, and a few
        # shapes to compile instead of every parameter.
        host = jax.local_devices(backend="cpu")[0]
        # Flax moves its seed and constants to the device implicitly.
        with jax.default_device(host), jax.transfer_guard("allow"):
            drawn = type(model)(model.config, rngs=nnx.Rngs(config.seed))
        params = nnx.state(drawn, nnx.Param)
    return place(params, sharding)
