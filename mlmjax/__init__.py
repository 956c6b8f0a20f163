"""mlmjax: masked language models that answer, in JAX.

Names are loaded on first use, so that reading a configuration or a data file never imports jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlmjax._version import __version__
from mlmjax.errors import InputError, RunError

if TYPE_CHECKING:
    from mlmjax.classification.classifier import Classifier
    from mlmjax.config.run import RunConfig, load_config
    from mlmjax.data.batch import Batch
    from mlmjax.evaluation.evaluate import run_evaluation
    from mlmjax.model.architecture import ModelConfig
    from mlmjax.model.modernbert import ModernBertForMaskedLM, ModernBertForSequenceClassification
    from mlmjax.model.vocabulary import resize_token_embeddings
    from mlmjax.scoring.fill_mask import fill_mask
    from mlmjax.scoring.likelihood import pseudo_log_likelihood
    from mlmjax.scoring.scorers import Scorer
    from mlmjax.text.prompts import Template
    from mlmjax.text.tokenizer import Tokenizer
    from mlmjax.text.verbalizer import Verbalizer
    from mlmjax.training.run.train import run_training
    from mlmjax.training.step import TrainState, create_train_state, make_train_step
    from mlmjax.weights.pretrained import load_pretrained, save_pretrained

_HOMES = {
    "Batch": "data.batch",
    "Classifier": "classification.classifier",
    "ModelConfig": "model.architecture",
    "ModernBertForMaskedLM": "model.modernbert",
    "ModernBertForSequenceClassification": "model.modernbert",
    "RunConfig": "config.run",
    "Scorer": "scoring.scorers",
    "Template": "text.prompts",
    "Tokenizer": "text.tokenizer",
    "TrainState": "training.step",
    "Verbalizer": "text.verbalizer",
    "create_train_state": "training.step",
    "fill_mask": "scoring.fill_mask",
    "load_config": "config.run",
    "load_pretrained": "weights.pretrained",
    "make_train_step": "training.step",
    "pseudo_log_likelihood": "scoring.likelihood",
    "resize_token_embeddings": "model.vocabulary",
    "run_evaluation": "evaluation.evaluate",
    "run_training": "training.run.train",
    "save_pretrained": "weights.pretrained",
}

__all__ = [
    "Batch",
    "Classifier",
    "InputError",
    "ModelConfig",
    "ModernBertForMaskedLM",
    "ModernBertForSequenceClassification",
    "RunConfig",
    "RunError",
    "Scorer",
    "Template",
    "Tokenizer",
    "TrainState",
    "Verbalizer",
    "__version__",
    "create_train_state",
    "data",
    "fill_mask",
    "load_config",
    "load_pretrained",
    "make_train_step",
    "pseudo_log_likelihood",
    "resize_token_embeddings",
    "run_evaluation",
    "run_training",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name == "data":
        return import_module("mlmjax.data")
    if name not in _HOMES:
        raise AttributeError(f"module 'mlmjax' has no attribute {name!r}")
    return getattr(import_module(f"mlmjax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
