"""Train and prompt masked language models that answer, in JAX.

Names are loaded on first use, so reading a configuration or a data file does not import jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlmjax._version import __version__ as __version__
from mlmjax.errors import InputError as InputError
from mlmjax.errors import RunError as RunError

if TYPE_CHECKING:  # Type checkers and editors do not read the table below.
    from mlmjax import data as data
    from mlmjax.classification.classifier import Classifier as Classifier
    from mlmjax.classification.explanations.explain import explain as explain
    from mlmjax.classification.programs.program import export_program as export_program
    from mlmjax.config.run import RunConfig as RunConfig
    from mlmjax.config.run import load_config as load_config
    from mlmjax.data.batch import Batch as Batch
    from mlmjax.decisions.decider import Decider as Decider
    from mlmjax.decisions.questions import Choice as Choice
    from mlmjax.decisions.questions import Score as Score
    from mlmjax.decisions.questions import YesNo as YesNo
    from mlmjax.evaluation.evaluate import run_evaluation as run_evaluation
    from mlmjax.model.architecture import ModelConfig as ModelConfig
    from mlmjax.model.modernbert import ModernBertForMaskedLM as ModernBertForMaskedLM
    from mlmjax.model.modernbert import (
        ModernBertForSequenceClassification as ModernBertForSequenceClassification,
    )
    from mlmjax.model.modernbert import ModernBertModel as ModernBertModel
    from mlmjax.model.vocabulary import resize_token_embeddings as resize_token_embeddings
    from mlmjax.scoring.fill_mask import fill_mask as fill_mask
    from mlmjax.scoring.likelihood import perplexity as perplexity
    from mlmjax.scoring.likelihood import pseudo_log_likelihood as pseudo_log_likelihood
    from mlmjax.scoring.masks.generation import generate as generate
    from mlmjax.scoring.masks.pairs import pair_log_probs as pair_log_probs
    from mlmjax.scoring.scorers import Scorer as Scorer
    from mlmjax.scoring.vectors.embedding import Embedder as Embedder
    from mlmjax.scoring.vectors.embedding import embed as embed
    from mlmjax.scoring.vectors.hidden_states import hidden_states as hidden_states
    from mlmjax.scoring.vectors.hidden_states import save_hidden_states as save_hidden_states
    from mlmjax.text.prompts import Template as Template
    from mlmjax.text.tokenizer import Tokenizer as Tokenizer
    from mlmjax.text.verbalizer import Verbalizer as Verbalizer
    from mlmjax.training.run.train import run_training as run_training
    from mlmjax.training.step import TrainState as TrainState
    from mlmjax.training.step import create_train_state as create_train_state
    from mlmjax.training.step import make_train_step as make_train_step
    from mlmjax.weights.adapters import save_adapter as save_adapter
    from mlmjax.weights.pretrained import load_pretrained as load_pretrained
    from mlmjax.weights.pretrained import save_pretrained as save_pretrained

_NAMES = {
    "classification.classifier": ["Classifier"],
    "classification.explanations.explain": ["explain"],
    "classification.programs.program": ["export_program"],
    "config.run": ["RunConfig", "load_config"],
    "data.batch": ["Batch"],
    "decisions.decider": ["Decider"],
    "decisions.questions": ["Choice", "Score", "YesNo"],
    "evaluation.evaluate": ["run_evaluation"],
    "model.architecture": ["ModelConfig"],
    "model.modernbert": [
        "ModernBertForMaskedLM",
        "ModernBertForSequenceClassification",
        "ModernBertModel",
    ],
    "model.vocabulary": ["resize_token_embeddings"],
    "scoring.vectors.embedding": ["Embedder", "embed"],
    "scoring.fill_mask": ["fill_mask"],
    "scoring.vectors.hidden_states": ["hidden_states", "save_hidden_states"],
    "scoring.likelihood": ["perplexity", "pseudo_log_likelihood"],
    "scoring.masks.generation": ["generate"],
    "scoring.masks.pairs": ["pair_log_probs"],
    "scoring.scorers": ["Scorer"],
    "text.prompts": ["Template"],
    "text.tokenizer": ["Tokenizer"],
    "text.verbalizer": ["Verbalizer"],
    "training.run.train": ["run_training"],
    "training.step": ["TrainState", "create_train_state", "make_train_step"],
    "weights.adapters": ["save_adapter"],
    "weights.pretrained": ["load_pretrained", "save_pretrained"],
}
_WITHOUT_JAX = ("config.", "data.", "text.")
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = ["InputError", "RunError", "__version__", "data", *_MODULES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name == "data":
        return import_module("mlmjax.data")
    if name not in _MODULES:
        raise AttributeError(f"module 'mlmjax' has no attribute {name!r}")
    if not _MODULES[name].startswith(_WITHOUT_JAX):
        import_module("mlmjax.parallel.environment").check_flags()
    return getattr(import_module(f"mlmjax.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
