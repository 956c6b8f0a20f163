"""Checks of lists, rows and numbers, and the error that names every bad row."""

import numpy as np
import pytest

from mlmjax.errors import InputError
from mlmjax.text import checks


@pytest.mark.parametrize("values", [[], ["a"], ("a",), np.array(["a"]), iter("ab")])
def test_lists_columns_and_streams_are_lists(values):
    assert checks.check_list(values, "x") is values


def test_a_set_has_no_order():
    with pytest.raises(InputError, match="x: is a set, which has no order"):
        checks.check_list({"a"}, "x")


@pytest.mark.parametrize("values", ["a", b"a", {"a": "b"}, 3, None])
def test_one_value_is_no_list(values):
    kind = "None" if values is None else f"one {type(values).__name__}"
    with pytest.raises(InputError, match=f"^x: found {kind}; expected a list of rows"):
        checks.check_list(values, "x", "rows")


def test_a_table_is_a_list_only_of_rows():
    table = np.zeros((2, 2))
    assert checks.check_list(table, "x", columns=2) is table
    for values in (table, np.array(1)):
        with pytest.raises(InputError, match=r"x: (is a table; expected|found one nd)"):
            checks.check_list(values, "x")


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
