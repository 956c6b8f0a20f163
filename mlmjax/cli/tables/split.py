"""Split the rows of a labelled table: to train on, to calibrate with, and to test."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlmjax.classification.fitting import split_rows
from mlmjax.data.reading.labelled import LabelledTable
from mlmjax.errors import InputError, counted
from mlmjax.evaluation.summary import warn_of_few
from mlmjax.reporting.markdown import shortened

WIDTH = 80
"""Characters of a line of the terminal."""

LEAST_CALIBRATION = 20
"""The fewest rows that a temperature is fitted to; from fewer it would be chance."""


class Split(NamedTuple):
    """Hold the numbers of the rows for each purpose; `said` tells a person what is special."""

    train: list[int]
    calibration: list[int]
    test: list[int]
    said: tuple[str, ...]


def split_table(
    table: LabelledTable, test_share: float, seed: int, *, calibration_share: float = 0.0
) -> Split:
    """Hold out a share of each label's rows to test, and a share of all rows to calibrate with.

    A text that the table has with several labels is only trained on. Raises `InputError` if too few
    rows remain on a side.
    """
    if test_share + calibration_share >= 1:
        raise InputError(
            f"--test-share {test_share:g} and --calibration-share {calibration_share:g}: leave no "
            "row to train on; give shares that sum to less than 1"
        )
    times = Counter(table.texts)
    clear = [i for i, text in enumerate(table.texts) if times[text] == 1]
    _, test = split_rows([table.labels[i] for i in clear], test_share, seed)
    tested = [clear[i] for i in test]
    trained = sorted(set(range(len(table.texts))) - set(tested))
    if not tested or len({table.labels[i] for i in trained}) < 2:
        found = ", ".join(f"{name} {count}" for name, count in Counter(table.labels).most_common(9))
        raise InputError(
            f"{table.where[0].rpartition(' line ')[0] or 'table'}: has too few rows to hold out "
            f"some of them for a test (rows by label: {found}); give at least two rows per label"
        )
    said = []
    if len(clear) < len(table.texts):
        several = sum(count > 1 for count in times.values())
        said.append(f"{counted(several, 'text')} with more than one label: not tested")
    untested = sorted(set(table.labels) - {table.labels[i] for i in tested})
    if untested:
        shown = shortened(", ".join(untested), WIDTH)
        said.append(f"warning: no row is tested for {counted(len(untested), 'label')}: {shown}")
    said += warn_of_few(len(tested), "held-out row")
    count = round(calibration_share * len(table.texts))
    calibrating = _spared(table.labels, trained, set(clear), count, seed)
    if calibration_share and len(calibrating) < LEAST_CALIBRATION:
        said.append(
            f"probabilities stay as they are: {counted(len(calibrating), 'row')} can be held out "
            f"for a temperature, which takes {LEAST_CALIBRATION}"
        )
        calibrating = []
    trained = sorted(set(trained) - set(calibrating))
    return Split(trained, calibrating, tested, tuple(said))


def _spared(
    labels: Sequence[str], trained: Sequence[int], clear: set[int], count: int, seed: int
) -> list[int]:
    """Draw rows that training can spare: of each label at least one row stays."""
    left = Counter(labels[i] for i in trained)
    found: list[int] = []
    for i in np.random.default_rng([seed, 2]).permutation(trained).tolist():
        if len(found) < count and i in clear and left[labels[i]] > 1:
            left[labels[i]] -= 1
            found.append(i)
    return sorted(found)
