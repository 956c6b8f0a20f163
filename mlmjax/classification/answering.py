"""What a classifier asks: its source is loaded when it is needed, texts become answers."""

import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from mlmjax.classification.prompter import Asking, Question
from mlmjax.classification.rounds import in_rounds, together
from mlmjax.classification.settings import Settings, make_asking, one_dimensional, settle
from mlmjax.config.tables import decode
from mlmjax.errors import InputError
from mlmjax.model.modernbert import ModernBertForMaskedLM, ModernBertForSequenceClassification
from mlmjax.scoring.scorers import check_texts
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.training.run.log import bar
from mlmjax.weights import hub
from mlmjax.weights.pretrained import Model, load_pretrained

CHUNK_PROMPTS = 4096
"""Prompts, about, that are laid out together; texts are read as they are needed."""

Source = str | Path | tuple[Model, Tokenizer]


class Answering:
    """Loads a source and asks it; `classifier.Classifier` says what its arguments mean."""

    source: Source
    dtype: str
    batch_size: int | None
    revision: str | None
    local_files_only: bool
    progress: bool | None
    settings_: Settings
    asking_: Asking
    classes_: np.ndarray
    manifest_: str | None

    def __getstate__(self) -> dict[str, Any]:
        """Keep weights as plain arrays and leave out what is compiled, so that it can be copied."""
        state: dict[str, Any] = {**super().__getstate__()}  # type: ignore[dict-item]
        if (asking := state.pop("asking_", None)) is not None:
            graphdef, params = nnx.split(asking.scorer.model)
            state["copied_"] = graphdef, jax.device_get(params), asking.scorer.tokenizer
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put together again what `__getstate__` gave."""
        copied = state.pop("copied_", None)
        super().__setstate__(state)  # type: ignore[misc]
        if copied is not None:
            graphdef, params, tokenizer = copied
            model = nnx.merge(graphdef, jax.tree.map(jax.numpy.asarray, params))
            self.asking_ = make_asking(self.settings_, model, tokenizer, batch_size=self.batch_size)

    def _ready(self) -> Asking:
        """Load what is not loaded yet, and return how it asks."""
        if not hasattr(self, "asking_"):
            settings, model, tokenizer, manifest = self._read()
            asking = make_asking(settings, model, tokenizer, batch_size=self.batch_size)
            self._keep(settings, asking)
            self.manifest_ = manifest
        return self.asking_

    def _keep(self, settings: Settings, asking: Asking) -> None:
        self.settings_, self.asking_ = settings, asking
        self.classes_ = np.array(list(settings.labels))
        self.manifest_ = None

    def _read(
        self, seen: Sequence[Any] | None = None
    ) -> tuple[Settings, Model, Tokenizer, str | None]:
        """Read the source, and settle what was given and what was saved with it."""
        saved, manifest = None, None
        model: Any
        if isinstance(self.source, tuple) and len(self.source) == 2:
            model, tokenizer = self.source
        elif not isinstance(self.source, str | Path):
            raise InputError(
                f"source is {self.source!r:.60}; expected a folder, a hub id, or a pair "
                "(model, tokenizer)"
            )
        else:
            where: dict[str, Any] = {
                "revision": self.revision,
                "local_files_only": self.local_files_only,
            }
            folder = hub.fetch(self.source, **where)
            if (folder / hub.CLASSIFIER).exists():
                values = hub.read_json(folder, hub.CLASSIFIER)
                saved = decode(Settings, values, str(folder / hub.CLASSIFIER))
            if (folder / hub.TRAINING).exists():
                manifest = hub.plain_file(folder, hub.TRAINING).read_text(encoding="utf-8")
            model, tokenizer = load_pretrained(self.source, dtype=self.dtype, **where)
        has_head = isinstance(model, ModernBertForSequenceClassification)
        settings = settle(vars(self), saved, model, tokenizer, seen)
        if settings.head == "classification" and not has_head and seen is None:
            raise InputError(
                f"a {ModernBertForMaskedLM.__name__} has no classification head; call fit, which "
                "trains one, or leave head out"
            )
        return settings, model, tokenizer, manifest

    def _raw(self, texts: Iterable[str], part: int = CHUNK_PROMPTS) -> Iterator[np.ndarray]:
        """Yield log probabilities before calibration: `[texts, labels]`, or `[questions, 2]`."""
        asking, names = self._ready(), list(self.settings_.labels)
        pending = iter(one_dimensional(texts, "texts"))
        each = (len(names) if self.settings_.multi_label else 1) * (asking.shifts or len(names))
        first, size = 0, min(part, max(16, CHUNK_PROMPTS // each))
        total = len(texts) if isinstance(texts, Sized) else None
        with bar("texts", self.progress) as shown:
            while chunk := list(itertools.islice(pending, size)):
                yield self._answers(chunk, first)
                first += len(chunk)
                if shown and total:
                    shown(first, total)

    def _answers(self, texts: Sequence[str], first: int) -> np.ndarray:
        where = check_texts(texts, first)
        questions = [question for text in texts for question in self._questions(text)]
        named = [name for name in where for _ in range(len(questions) // len(texts))]
        if self.settings_.head == "classification":
            return np.array(self._ask(questions, named))
        return np.array(in_rounds(self._ask, questions, named, self._size()))

    def _size(self) -> int:
        """Return how many labels one prompt holds."""
        if self.settings_.multi_label:
            return 2
        return together(self.asking_, len(self.settings_.labels))

    def _questions(self, text: str) -> list[Question]:
        if not self.settings_.multi_label:
            return [Question(text, self._order())]
        shown = zip(self.settings_.labels, self.settings_.shown, strict=True)
        return [Question(text, (0, 1), {"label": said}, name) for name, said in shown]

    def _order(self) -> tuple[int, ...]:
        """Return the options in the order of `classes_`, which a head may have in another."""
        if self.settings_.head != "classification":
            return tuple(range(len(self.classes_)))
        return tuple(self.asking_.scorer.labels.index(str(name)) for name in self.classes_)

    def _ask(self, questions: Sequence[Question], where: Sequence[str]) -> list[np.ndarray]:
        return self.asking_.ask(questions, where)
