"""Compare what a fit learned with always giving the frequencies of the labels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlmjax.statistics.metrics import wilson_interval

Weights = np.ndarray | None
"""How much each row counts; None: all alike."""

NEARLY_ALL = 0.95
"""A classifier that gives one answer to this share of texts does not tell them apart."""

MOST_SHOWN = 40
"""Characters of a label that a line shows."""

ENOUGH = 100
"""Training texts from which the first epoch is asked whether others are answered, too."""

NOT_SHOWN = "nothing shows that it answers others"
"""What a problem says that a test on other texts answers."""

_NORMAL = 1.96  # two-sided 95 % of a normal distribution


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How `n` texts are answered, next to two baselines that read no text.

    Means and shares are weighted if the texts have weights, and `effective_n` is the number of
    equal texts that they are worth (Kish 1965).
    `loss` is the mean cross-entropy of the right labels or distributions, in nats.
    `baseline_loss` is that of always giving the label frequencies of the training texts, and
    `gain_ci95` the 95 % interval of the mean of their difference over texts. `majority` is the
    accuracy of always giving the commonest training label. `answer` is the column of the commonest
    answer, and `answer_share` the share of texts that get it.
    """

    n: int
    effective_n: float
    loss: float
    baseline_loss: float
    gain_ci95: tuple[float, float]
    accuracy: float
    accuracy_ci95: tuple[float, float]
    majority: float
    answer: int
    answer_share: float

    @property
    def is_better(self) -> bool:
        """Tell whether the loss is below the baseline's by more than chance explains."""
        return self.gain_ci95[0] > 0


def measure(
    log_probs: np.ndarray, targets: np.ndarray, frequencies: np.ndarray, weights: Weights = None
) -> Measured:
    """Compare answers with the right ones.

    `log_probs` and `targets` are `[rows, columns]`; a row of targets sums to 1. `frequencies` are
    those of the columns in training, `[columns]` or `[rows, columns]`, all above 0. `weights`
    `[rows]` are above 0.

    >>> found = measure(np.log([[0.9, 0.1], [0.2, 0.8]]), np.eye(2), np.array([0.5, 0.5]))
    >>> round(found.loss, 3), round(found.baseline_loss, 3), found.accuracy, found.majority
    (0.164, 0.693, 1.0, 0.5)
    """
    targets = targets.astype(np.float64)
    frequencies = np.broadcast_to(frequencies, targets.shape)
    own = _row_weights(weights, len(targets))
    total, worth = own.sum(), own.sum() ** 2 / (own**2).sum()
    losses = -(targets * log_probs).sum(axis=1)
    baseline = -(targets * np.log(frequencies)).sum(axis=1)
    gain = own @ (baseline - losses) / total
    variance = own @ (baseline - losses - gain) ** 2 / total
    half = _NORMAL * np.sqrt(variance / (worth - 1)) if worth > 1 else np.inf
    answers, right = log_probs.argmax(axis=1), targets.argmax(axis=1)
    correct = own @ (answers == right)
    counts = np.bincount(answers, own, targets.shape[1])
    return Measured(
        n=len(targets),
        effective_n=float(worth),
        loss=float(own @ losses / total),
        baseline_loss=float(own @ baseline / total),
        gain_ci95=(float(gain - half), float(gain + half)),
        accuracy=float(correct / total),
        accuracy_ci95=wilson_interval(float(correct * worth / total), float(worth)),
        majority=float(own @ (frequencies.argmax(axis=1) == right) / total),
        answer=int(counts.argmax()),
        answer_share=float(counts.max() / total),
    )


def _row_weights(weights: Weights, rows: int) -> np.ndarray:
    return np.ones(rows) if weights is None else weights.astype(np.float64)


def label_frequencies(targets: np.ndarray, groups: int = 1, weights: Weights = None) -> np.ndarray:
    """Return the frequency of each column in targets `[rows, columns]`, `[groups, columns]`.

    Row r belongs to group `r % groups`. Half a row of mean weight is added to each column, so that
    no frequency is 0.

    >>> label_frequencies(np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).round(2).tolist()
    [[0.62, 0.38]]
    """
    own = _row_weights(weights, len(targets))
    counted = targets * (own / own.mean())[:, None]
    sums = counted.reshape(-1, groups, targets.shape[1]).sum(axis=0, dtype=np.float64) + 0.5
    shares: np.ndarray = sums / sums.sum(axis=1, keepdims=True)
    return shares


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One training of a fit: its seed and settings, and what it came to.

    `validation` is None without held-out texts. `problems` say why nothing was learned, if so.
    """

    seed: int
    learning_rate: float
    warmup: float
    history: tuple[Mapping[str, float], ...]
    training: Measured
    validation: Measured | None
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FitSummary:
    """What a fit came to: the attempt whose weights were kept, and all attempts in order.

    `warning` is the line that `fit` warned with, or None.
    """

    kept: int
    attempts: tuple[Attempt, ...]
    warning: str | None

    @property
    def training(self) -> Measured:
        """Return the figures on training texts, of the weights that were kept."""
        return self.attempts[self.kept].training

    @property
    def validation(self) -> Measured | None:
        """Return the figures on held-out texts, of the weights that were kept."""
        return self.attempts[self.kept].validation

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON holds them."""
        return asdict(self)


def find_problems(
    history: Sequence[Mapping[str, float]],
    training: Measured,
    validation: Measured | None,
    names: Sequence[str],
) -> list[str]:
    """Say in a phrase each what shows that nothing was learned; `names` are those of the columns.

    An epoch of `history` has `loss`, `accuracy` and `baseline_loss` over `n` texts and, of several
    updates, the standard error of that loss as `loss_error`. Those of the first epoch are of texts
    that no update had seen, so without `validation` they tell whether other texts are answered.
    """
    found = []
    if not training.is_better:
        found.append(_no_gain("training", training))
    elif validation is None:
        found += _unknown_of_others(history[0], training)
    elif not validation.is_better and not _is_ahead(validation):
        found.append(_no_gain("held-out", validation))
    if training.answer_share >= NEARLY_ALL and _is_apart(training):
        share = f"{training.answer_share:.0%} of {training.n} training texts"
        name = names[training.answer]
        shown = name if len(name) <= MOST_SHOWN else f"{name[: MOST_SHOWN - 1]}…"
        found.append(f"it answers {shown!r} for {share}")
    first, last = min(history, key=lambda epoch: epoch["loss"]), history[-1]
    error = np.hypot(first.get("loss_error", np.inf), last.get("loss_error", np.inf))
    if last["loss"] - first["loss"] > _NORMAL * error:
        found.append(
            f"its loss grew from {first['loss']:.3f} in epoch {first['epoch']:.0f} to "
            f"{last['loss']:.3f} in epoch {last['epoch']:.0f}"
        )
    return found


def _unknown_of_others(first: Mapping[str, float], training: Measured) -> Iterator[str]:
    """Yield a phrase if texts that were new in the first epoch were answered as by chance."""
    n, error = first.get("n", 0), first.get("loss_error", np.inf)
    if n < ENOUGH or not np.isfinite(error):
        return
    gain = first["baseline_loss"] - first["loss"]
    ahead = wilson_interval(first["accuracy"] * n, n)[0] > training.majority
    if gain <= _NORMAL * error and not ahead:
        yield (
            f"it answers {training.accuracy:.0%} of its training texts, and {NOT_SHOWN}: "
            f"{first['accuracy']:.0%} were right when it first saw them, and "
            f"{training.majority:.0%} are by the commonest label"
        )


def _no_gain(kind: str, measured: Measured) -> str:
    return (
        f"its loss on {measured.n} {kind} texts is {measured.loss:.3f}, and "
        f"{measured.baseline_loss:.3f} by always giving the label frequencies"
    )


def _is_apart(measured: Measured) -> bool:
    """Tell whether one answer is more frequent than the commonest label can be by chance."""
    n = measured.effective_n
    shares = measured.answer_share, measured.majority
    answers, labels = (wilson_interval(share * n, n) for share in shares)
    return answers[0] > labels[1]


def _is_ahead(measured: Measured) -> bool:
    return measured.accuracy_ci95[0] > measured.majority
