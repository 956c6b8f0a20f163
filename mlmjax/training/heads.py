"""The classification head in training: a model that has one, its loss, its evaluation."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlmjax.data.batch import LabelBatch
from mlmjax.errors import InputError
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.encoder import make_classifier
from mlmjax.model.modernbert import ModernBertForMaskedLM, ModernBertForSequenceClassification
from mlmjax.training.loss import Metrics

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


def label_loss(model: Any, batch: LabelBatch) -> tuple[jax.Array, Metrics]:
    """Sum the loss of `label_evaluation` over the texts: `(loss_sum, metrics)`."""
    metrics = label_evaluation(model, batch)
    del metrics["logits"]
    return metrics["loss_sum"], metrics


def label_evaluation(model: Any, batch: LabelBatch) -> Metrics:
    """Return `loss_sum` and `loss_count` over labelled texts, and `logits` `[texts, labels]`.

    Cross-entropy, with `label_count` and `label_correct`, where the model has several labels;
    squared error where it has one, as transformers computes them.
    """
    given = jnp.asarray(batch.labels)
    segments = given.shape[1] if given.ndim == 2 else None
    logits = model(batch.input_ids, batch.segment_ids, segments=segments)
    logits, given = logits.reshape(given.size, logits.shape[-1]), given.reshape(-1)
    used = ~jnp.isnan(given)
    labels = jnp.where(used, given, 0.0)
    count = jnp.sum(used, dtype=jnp.int32).astype(jnp.float32)
    more: Metrics = {}
    if logits.shape[1] == 1:
        losses = jnp.square(logits[:, 0] - labels)
    else:
        numbers = labels.astype(jnp.int32)
        chosen = jnp.take_along_axis(logits, numbers[:, None], axis=1)[:, 0]
        losses = jax.nn.logsumexp(logits, axis=1) - chosen
        correct = used & (jnp.argmax(logits, axis=1) == numbers)
        more = {
            "label_count": count,
            "label_correct": jnp.sum(correct, dtype=jnp.int32).astype(jnp.float32),
        }
    loss_sum = jnp.sum(jnp.where(used, losses, 0.0))
    return {"loss_sum": loss_sum, "loss_count": count, **more, "logits": logits}
