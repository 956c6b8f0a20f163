"""How far a classifier's probabilities can be trusted: calibration, label sets, abstaining."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from mlmjax.classification.answering import Answering
from mlmjax.classification.labels import label_numbers
from mlmjax.classification.prompter import Asking
from mlmjax.classification.settings import one_dimensional, share
from mlmjax.errors import InputError
from mlmjax.statistics import label_sets
from mlmjax.statistics.calibration import (
    Calibration,
    batch_calibration,
    null_calibration,
    order_calibration,
    temperature_calibration,
)
from mlmjax.statistics.option_orders import shifted, shifts

NULL_TEXTS = ("N/A", "none", "...")
"""Texts without content, whose answers are what the prompt alone suggests."""

Method = Literal["batch", "null", "order", "temperature"]


class Trust(Answering):
    """The part of a classifier that deals with its probabilities once they are there.

    What is found here is saved with the classifier and used by its predictions.
    """

    @property
    def calibration_(self) -> Calibration | None:
        """What `calibrate` found, None before."""
        self._ready()
        return self.settings_.calibration

    @property
    def conformal_(self) -> label_sets.Conformal | None:
        """What `conform` found, None before."""
        self._ready()
        return self.settings_.conformal

    @property
    def threshold_(self) -> float | None:
        """The probability below which it abstains, given or found by `abstain`; None for none."""
        self._ready()
        return self.settings_.abstain_below

    def calibrate(
        self,
        texts: Iterable[str] | None = None,
        labels: Iterable[Any] | None = None,
        *,
        method: Method | None = None,
    ) -> Any:
        """Calibrate the probabilities on texts that were not trained on; returns the classifier.

        - "batch" (the default without labels): takes off what the model says of all these texts
          alike, which assumes that labels are about equally frequent in them.
        - "null" (the default without texts): takes off what it says of texts without content,
          those given or `NULL_TEXTS`; with {options} or without this is contextual calibration.
          Not for a fitted classifier, to which such texts are like none it has learned from.
        - "order": takes off its preference for option names, found under all cyclic orders of the
          options (up to 8) of these texts; predictions then take one pass as before.
        - "temperature" (the default with labels): how sure it is, without changing an answer.

        The first three start anew; "temperature" is put on top of what is there. Label sets and
        a threshold that were found before are dropped, since they no longer hold.
        """
        asking, given = self._ready(), None if texts is None else self._listed(texts)
        method = method or ("temperature" if labels is not None else "batch" if given else "null")
        if method not in ("batch", "null", "order", "temperature"):
            raise InputError(
                f"method is {method!r}; expected 'batch', 'null', 'order' or 'temperature'"
            )
        if (method == "temperature") != (labels is not None):
            raise InputError(
                f"method {method!r} takes {'' if labels is None else 'no '}labels; with labels the "
                "temperature is found, without them a bias"
            )
        if method == "null":
            given = given or list(NULL_TEXTS)
        if not given:
            raise InputError(f"method {method!r} needs texts; give some that were not trained on")
        found: Calibration
        if method == "order":
            found = order_calibration(self._by_name(asking, given))
        else:
            raw = np.concatenate(list(self._raw(given)))
            if method == "batch":
                found = batch_calibration(raw)
            elif method == "null":
                found = null_calibration(raw)
            else:
                truth = self._gold(labels if labels is not None else (), len(given))
                before = self.settings_.calibration
                found = temperature_calibration(self._calibrated(raw), truth)
                found = found if before is None else before.then(found)
        self._learned(calibration=found, conformal=None, abstain_below=None)
        return self

    def conform(
        self, texts: Iterable[str], labels: Iterable[Any], *, method: label_sets.Method = "lac"
    ) -> Any:
        """Learn label sets from texts that neither training nor `calibrate` has seen.

        `conformal.fit` has the methods; `predict_set` gives the sets. Returns the classifier.
        """
        raw, truth = self._labelled(texts, labels)
        self._learned(conformal=label_sets.fit(raw, truth, method=method))
        return self

    def predict_set(self, texts: Iterable[str], *, coverage: float = 0.9) -> np.ndarray:
        """Return a set of labels for each text, bool `[texts, labels]`.

        The share of texts whose right label is in its set is `coverage` or more, on average over
        texts drawn as those of `conform`. Raises `InputError` without `conform`, or where its
        texts are too few for this coverage.
        """
        self._ready()
        sets = self.settings_.conformal
        if sets is None:
            raise InputError("there are no label sets yet; call conform with labelled texts first")
        parts = [sets.sets(self._calibrated(raw), coverage) for raw in self._raw(texts)]
        return np.concatenate([np.zeros((0, len(self.classes_)), bool), *parts])

    def abstain(
        self, texts: Iterable[str], labels: Iterable[Any], *, accuracy: float, least: int = 10
    ) -> Any:
        """Answer only where these texts say that `accuracy` of the answers given are right.

        The threshold (`threshold_`) is the lowest probability from which on that is so here, for at
        least `least` of these texts; it is as good as they are many. `score` counts a text without
        an answer as wrong. Returns the classifier. Raises `InputError` where no threshold will do.
        """
        share(accuracy, "accuracy")
        if accuracy == 0 or least < 1:
            raise InputError(f"accuracy is {accuracy}, least {least}; expected more than 0")
        scores, truth = self._labelled(texts, labels)
        best = np.exp(scores.astype(np.float64).max(axis=1))
        order = np.argsort(-best, kind="stable")
        right = np.cumsum((scores.argmax(axis=1) == truth)[order]) / (np.arange(len(order)) + 1)
        # Texts of equal probability are answered together or not at all.
        last = np.append(best[order][1:] < best[order][:-1], True)
        enough = np.arange(len(order)) >= min(least, len(order)) - 1
        reached = np.flatnonzero((right >= accuracy) & last & enough)
        if not len(reached):
            raise InputError(
                f"no threshold reaches an accuracy of {accuracy} with {least} answers or more on "
                f"these {len(truth)} texts, but at most {right[last & enough].max():.3f}; ask for "
                "less, or give more texts"
            )
        self._learned(abstain_below=float(best[order][reached[-1]]))
        return self

    def _labelled(
        self, texts: Iterable[str], labels: Iterable[Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        self._ready()
        if self.settings_.multi_label:
            raise InputError(
                "label sets and abstaining are for one label per text; with multi_label every "
                "label has a probability of its own: take those above a limit of yours"
            )
        given = self._listed(texts)
        truth = self._gold(labels, len(given))
        return self._calibrated(np.concatenate(list(self._raw(given)))), truth

    def _listed(self, texts: Iterable[str]) -> list[str]:
        listed = list(one_dimensional(texts, "texts"))
        if not listed:
            raise InputError("texts: there is none; give at least one")
        return listed

    def _gold(self, labels: Iterable[Any], texts: int) -> np.ndarray:
        """Return the right column of each row of `_raw`."""
        rows = label_numbers(labels, list(self.classes_), self.settings_.multi_label)
        if len(rows) != texts:
            raise InputError(f"{texts} texts and {len(rows)} labels; give one per text")
        if self.settings_.multi_label:
            return 1 - np.array(rows, int).reshape(-1)
        return np.array(rows)

    def _by_name(self, asking: Asking, texts: Sequence[str]) -> np.ndarray:
        """Ask texts under cyclic orders: `[questions, orders, option names]`."""
        count = 2 if self.settings_.multi_label else len(self.classes_)
        if asking.own_names or asking.shifts != 1 or self._size() < count:
            raise InputError(
                "method 'order' is for options named by letters, all of them in one prompt, asked "
                "in one order; leave it out"
            )
        moved = shifts(count, min(count, 8))
        scores = []
        for shift in moved:
            questions = [
                question._replace(choice=tuple(shifted(question.choice, shift)))
                for text in texts
                for question in self._questions(text)
            ]
            each = len(questions) // len(texts)
            where = [f"row {i + 1} (index {i})" for i in range(len(texts)) for _ in range(each)]
            scores.append(self._ask(questions, where))
        return np.array(scores).transpose(1, 0, 2)

    def _calibrated(self, raw: np.ndarray) -> np.ndarray:
        calibration = self.settings_.calibration
        return raw if calibration is None else calibration.apply(raw)

    def _learned(self, **values: Any) -> None:
        self.settings_ = self.settings_.model_copy(update=values)
