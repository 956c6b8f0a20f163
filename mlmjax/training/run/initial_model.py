"""What a run starts from: the model and the tokenizer, checked against each other and the run."""

from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from mlmjax.config.run import RunConfig
from mlmjax.errors import InputError
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.encoder import Options
from mlmjax.model.modernbert import (
    Model,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    abstract_model,
    labelled_config,
    with_classifier,
)
from mlmjax.parallel.sharding import place
from mlmjax.storage import CONFIG, read_json
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.training.step import parameter_sharding
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
"""Models known without their folder: what their config.json has that is not the default."""

DROPOUTS = ("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout")


def load_start(config: RunConfig) -> tuple[Model, Tokenizer]:
    """Load `init_from`, or describe the model of `[model]` without taking memory for it.

    With `head = "classification"` the model is one of the sources' labels. Raises `InputError` for
    a model that cannot be trained so, and a tokenizer that is not its own.
    """
    own = Tokenizer.from_pretrained(config.tokenizer) if config.tokenizer else None
    model: Any
    if config.init_from is not None:
        where = config.init_from
        model, tokenizer = pretrained.load_pretrained(
            where, revision=config.revision, **_options(config)
        )
        tokenizer = own or tokenizer
        if config.head == "classification":
            model = with_classifier(model, config.label_names, seed=config.seed)
        elif not isinstance(model, ModernBertForMaskedLM):
            raise InputError(
                f"{where}: is a {type(model).__name__}; this training needs a "
                f"{ModernBertForMaskedLM.__name__}, or head = 'classification'"
            )
    else:
        where = "[model]"
        tokenizer = own or Tokenizer.from_pretrained()
        model = _described(config, tokenizer)
    pretrained.check_tokenizer(Path(where), model.config, model.config.to_hf(), tokenizer)
    _check_architecture(config, where, model.config)
    return model, tokenizer


def describe_start(config: RunConfig) -> Model:
    """Describe the model `load_start` loads, by its configuration alone: shapes, no weights.

    Models of `PUBLISHED` need no folder and no hub. Raises `InputError` as `load_start`.
    """
    model: Any
    if config.init_from is None:
        model = _described(config, load_tokenizer(config))
    else:
        where = config.init_from
        if where in PUBLISHED and not Path(where).is_dir():
            architecture = ModelConfig.from_hf(PUBLISHED[where])
        else:
            folder = hub.fetch(where, revision=config.revision, weights=False)
            architecture = pretrained.read_config(folder, read_json(folder, CONFIG))
        model = _of_head(config, architecture)
    _check_architecture(config, config.init_from or "[model]", model.config)
    return model


def _check_architecture(config: RunConfig, where: str, architecture: ModelConfig) -> None:
    longest = architecture.max_position_embeddings
    if config.data.seq_length > longest:
        raise InputError(
            f"data.seq_length: found {config.data.seq_length}; the model takes at most {longest} "
            "positions (max_position_embeddings)"
        )
    for name in DROPOUTS[: 3 if config.head == "mlm" else 4]:
        if getattr(architecture, name):
            raise InputError(
                f"{where}: {name} is {getattr(architecture, name)}; training has no dropout: set "
                "it to 0 in the model's configuration"
            )


def load_tokenizer(config: RunConfig) -> Tokenizer:
    """Load the tokenizer of a run without its model."""
    if config.init_from is None or config.tokenizer is not None:
        return Tokenizer.from_pretrained(config.tokenizer)
    return pretrained.read_tokenizer(
        hub.fetch(config.init_from, revision=config.revision, weights=False)
    )


def _described(config: RunConfig, tokenizer: Tokenizer) -> Any:
    defaults = {
        "vocab_size": -(-tokenizer.vocab_size // 64) * 64,
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.cls_id,
        "eos_token_id": tokenizer.sep_id,
        "cls_token_id": tokenizer.cls_id,
        "sep_token_id": tokenizer.sep_id,
    }
    return _of_head(config, ModelConfig.from_hf(defaults | dict(config.model or {}), strict=True))


def _of_head(config: RunConfig, architecture: ModelConfig) -> Any:
    kind: type = ModernBertForMaskedLM
    if config.head == "classification":
        architecture = labelled_config(architecture, config.label_names)
        kind = ModernBertForSequenceClassification
    return abstract_model(kind.__name__, architecture, Options(**_options(config)))


def _options(config: RunConfig) -> dict[str, Any]:
    return {
        name: getattr(config, name) for name in ("dtype", "attention", "remat", "splash_blocks")
    }


def initial_parameters(config: RunConfig, model: Any, params: Any, mesh: Mesh) -> Any:
    """Put the loaded parameters, or those of a new model, on the mesh."""
    sharding = parameter_sharding(mesh, params)
    if config.init_from is None:
        # Drawn on the host: the same numbers on every mesh, no whole copy on any device, and a few
        # shapes to compile instead of every parameter.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            drawn = type(model)(model.config, rngs=nnx.Rngs(config.seed))
        params = nnx.state(drawn, nnx.Param)
    return place(params, sharding)
