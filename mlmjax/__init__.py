"""mlmjax: masked language models that answer, in JAX.

Names are loaded on first use, so that reading a configuration or a data file never imports jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlmjax._version import __version__
from mlmjax.errors import InputError, RunError

if TYPE_CHECKING:
    from mlmjax.architecture import ModelConfig
    from mlmjax.classifier import Classifier
    from mlmjax.config import RunConfig, load_config
    from mlmjax.data.batch import Batch
    from mlmjax.evaluate import run_evaluation
    from mlmjax.hf import load_pretrained, save_pretrained
    from mlmjax.modernbert import ModernBertForMaskedLM, ModernBertForSequenceClassification
    from mlmjax.pll import fill_mask, pseudo_log_likelihood
    from mlmjax.prompts import Template, Verbalizer
    from mlmjax.score import Scorer
    from mlmjax.step import TrainState, create_train_state, make_train_step
    from mlmjax.tokenizer import Tokenizer
    from mlmjax.train import run_training
    from mlmjax.vocabulary import resize_token_embeddings

_HOMES = {
    "Batch": "data.batch",
    "Classifier": "classifier",
    "ModelConfig": "architecture",
    "ModernBertForMaskedLM": "modernbert",
    "ModernBertForSequenceClassification": "modernbert",
    "RunConfig": "config",
    "Scorer": "score",
    "Template": "prompts",
    "Tokenizer": "tokenizer",
    "TrainState": "step",
    "Verbalizer": "prompts",
    "create_train_state": "step",
    "fill_mask": "pll",
    "load_config": "config",
    "load_pretrained": "hf",
    "make_train_step": "step",
    "pseudo_log_likelihood": "pll",
    "resize_token_embeddings": "vocabulary",
    "run_evaluation": "evaluate",
    "run_training": "train",
    "save_pretrained": "hf",
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
