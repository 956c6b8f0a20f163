"""Labels: one rule decides between a name and a position; a missing value is never a label."""

import pytest

from mlmjax import InputError
from mlmjax.config.labels import find_label, is_dropped

STARS = ("1", "2", "3", "4", "5")


@pytest.mark.parametrize(
    ("names", "values", "expected"),
    [
        (("no", "yes"), [" yes", "no ", 1, "0", 1.0], [1, 0, 1, 0, 1]),
        (("no", "yes"), [2, "maybe", None, [1]], [None, None, None, None]),
        (STARS, ["1", " 5 "], [0, 4]),
        (("0", "1"), [0, "1", 1.0], [0, 1, 1]),
        (("false", "true"), [True, "false"], [1, 0]),
        ((" yes", "no"), ["yes", " yes"], [0, 0]),
    ],
)  # fmt: skip
def test_a_value_is_a_name_or_a_position(names, values, expected):
    assert [find_label(value, names) for value in values] == expected


@pytest.mark.parametrize("value", [0, 1, 4, 5, "0", 1.0])
def test_a_number_that_may_be_both_is_refused(value):
    with pytest.raises(InputError, match="may be a name or a position in labels; write labels as"):
        find_label(value, STARS)
    assert find_label(value, STARS, {str(int(float(value))): "1"}) == 0


def test_labels_are_dropped_as_written_and_as_normalised():
    drop = ("-1", "null", "", "unsure")
    assert [is_dropped(v, v, drop) for v in (-1, "-1", -1.0, None, float("nan"), " ", 1)] == [
        *[True] * 6,
        False,
    ]
    assert is_dropped("Unsure.", "unsure", drop)
    assert not is_dropped("Unsure.", "Unsure.", ())
