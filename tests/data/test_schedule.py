import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmjax.config.data import DataConfig
from mlmjax.config.run import ObjectiveConfig
from mlmjax.data.schedule import RowSchedule, mask_rate, row_schedule, target_width
from mlmjax.errors import InputError


@given(start=st.integers(1, 9), times=st.integers(1, 9), warmup=st.integers(0, 60))
def test_rows_grow_from_start_to_full_and_add_up(start, times, warmup):
    schedule = RowSchedule(start, start * times, warmup)
    rows = [schedule.rows(step) for step in range(70)]
    assert rows[warmup:] == [start * times] * (70 - warmup)
    assert rows == sorted(rows)
    assert not any(count % start for count in rows)
    assert warmup == 0 or rows[0] == start
    assert [schedule.before(step) for step in range(70)] == [sum(rows[:n]) for n in range(70)]


def test_a_growing_batch_keeps_its_micro_batch():
    data = {"rows": "r", "batch_size": 32, "accumulate": 4}
    assert row_schedule(DataConfig(**data), 10).rows(0) == 32
    grown = row_schedule(DataConfig(**data, batch_start=8, batch_warmup=0.5), 10)
    assert [grown.rows(step) for step in range(7)] == [8, 8, 16, 16, 24, 32, 32]
    for changes, steps, message in (
        ({"batch_start": 4}, 10, "batch_start: found 4; .*micro-batch of 8 rows"),
        ({"batch_start": 12, "accumulate": 1}, 10, "batch_start: found 12; expected a divisor"),
        ({"batch_start": 8, "batch_warmup": 11}, 10, "batch_warmup: 11 updates of 10 steps"),
        ({"batch_start": 8}, 4, r"batch_warmup: 0 updates of 4 steps \(0.1 of them, rounded\)"),
    ):
        with pytest.raises(InputError, match=message):
            row_schedule(DataConfig(**data | changes), steps)


def test_the_mask_rate_is_linear_and_its_largest_value_bounds_the_targets():
    objective = ObjectiveConfig(mlm_rate=0.15, mlm_rate_end=0.4)
    rate = mask_rate(objective, 101)
    assert [rate(step) for step in (0, 50, 100, 200)] == pytest.approx([0.15, 0.275, 0.4, 0.4])
    assert target_width(objective, 100, 3, text=True) == 43
    assert mask_rate(ObjectiveConfig(mlm_rate=0.2), 5)(3) == 0.2
    assert mask_rate(objective, 1)(0) == 0.15
