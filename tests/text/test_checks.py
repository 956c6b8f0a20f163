"""Checks of lists, rows and numbers, and the error that names every bad row."""

import numpy as np
import pytest

from mlmjax.errors import InputError
from mlmjax.text import checks


@pytest.mark.parametrize("values", [[], ["a"], ("a",), np.array(["a"]), iter("ab")])
def test_lists_columns_and_streams_are_lists(values):
    assert checks.check_list(values, "x") is values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a"}, "is a set, which has no order"),
        (np.zeros((2, 2)), "is a table; expected one column of rows"),
        (np.array(1), "is a table; expected one column of rows"),
        (None, "found None; expected a list of rows"),
        *((one, f"found one {type(one).__name__}; exp") for one in ("a", b"a", {"a": "b"}, 3)),
    ],
)
def test_anything_else_is_rejected(values, message):
    with pytest.raises(InputError, match=f"^x: {message}"):
        checks.check_list(values, "x", "rows")


def test_a_table_may_be_a_list_of_rows():
    table = np.zeros((2, 2))
    assert checks.check_list(table, "x", columns=2) is table


def test_one_error_names_every_bad_row_once():
    def double(value):
        if value < 0:
            raise InputError(f"is {value}")
        return 2 * value

    assert checks.for_each_row(double, checks.name_rows([1, 2])) == [2, 4]
    rows = [("a", -1), ("b", 1), ("c", -2), ("a", -1)]
    with pytest.raises(InputError) as caught:
        checks.for_each_row(double, rows)
    assert (caught.value.message, caught.value.details) == ("a: is -1", ("c: is -2",))


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, "0.5", None])
def test_a_share_is_a_number_from_0_to_1(value):
    assert checks.check_share(np.float32(0.5), "x") == 0.5
    with pytest.raises(InputError, match=r"x is .*; expected a number from 0 to 1"):
        checks.check_share(value, "x")
