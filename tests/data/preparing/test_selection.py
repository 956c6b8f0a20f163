from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmjax.data.preparing.selection import LEFT_OUT, Members, mix, select


def make_members(counts):
    """Return so many examples of each (task, answer), in some order, with different hashes."""
    groups = np.repeat(np.array(list(counts)), list(counts.values()), axis=0)
    order = np.random.default_rng(0).permutation(len(groups))
    keys = mix(np.arange(len(groups), dtype=np.uint64))
    return Members(groups[order, 0], groups[order, 1], keys)


def scan_of(members, size=97):
    starts = range(0, len(members.key), size)
    return lambda: (Members(*(column[i : i + size] for column in members)) for i in starts)


def kept(members, selection, level):
    chosen = selection.levels(members) <= level
    return Counter(zip(members.task[chosen].tolist(), members.answer[chosen].tolist(), strict=True))


COUNTS = {(0, 5): 900, (0, 6): 60, (0, 7): 40, (1, 5): 300, (1, 9): 300, (2, 5): 20, (3, 8): 700}


MEMBERS = make_members(COUNTS)


def selected(members=MEMBERS, **options):
    return select(scan_of(members), COUNTS, **options)


def by_task(counts):
    total = Counter()
    for (task, _), n in counts.items():
        total[task] += n
    return total


def test_sizes_are_met_by_cutting_the_largest_tasks_to_one_number():
    selection = selected(sizes=(500, 1000, None))
    assert by_task(kept(MEMBERS, selection, 0)) == {0: 160, 1: 160, 2: 20, 3: 160}
    assert by_task(kept(MEMBERS, selection, 1)) == {0: 327, 1: 327, 2: 20, 3: 327}
    assert kept(MEMBERS, selection, 2) == Counter(COUNTS)


def test_smaller_sets_are_parts_of_larger_ones():
    sizes = (100, 400, 900, 1600)
    level = selected(sizes=sizes, answer_share=0.5).levels(MEMBERS)
    for number, size in enumerate(sizes[:2]):
        only = selected(sizes=(size,), answer_share=0.5).levels(MEMBERS)
        np.testing.assert_array_equal(level <= number, only == 0)


def test_no_answer_has_more_than_its_share():
    found = kept(MEMBERS, selected(answer_share=0.5), 0)
    assert found[0, 5] == found[0, 6] + found[0, 7] == 100
    assert found[1, 5] == found[1, 9] == 300
    assert found[3, 8] == 700  # A task of one answer cannot be balanced.
    thinned = kept(MEMBERS, selected(answer_share=0.2), 0)
    assert thinned[0, 5] == thinned[0, 6] == thinned[0, 7] == 40  # As the rarest.


def test_a_cap_by_task_holds_with_the_share():
    found = kept(MEMBERS, selected(per_task=150, answer_share=0.5), 0)
    assert by_task(found) == {0: 150, 1: 150, 2: 20, 3: 150}
    assert 55 < found[0, 5] < 95  # Half of them, as before the cap.


def test_equal_hashes_stay_together():
    members = MEMBERS._replace(key=mix(np.arange(len(MEMBERS.key), dtype=np.uint64) // 10))
    in_set = selected(members, per_task=101).levels(members) < LEFT_OUT
    for key in np.unique(members.key):
        for task in range(4):
            same = in_set[(members.key == key) & (members.task == task)]
            assert same.all() or not same.any()


@settings(deadline=None, max_examples=40)
@given(
    counts=st.dictionaries(st.sampled_from([*COUNTS, (0, 8)]), st.integers(1, 120), min_size=1),
    size=st.integers(1, 400),
    share=st.none() | st.floats(0.05, 1.0),
)
def test_what_is_kept_is_what_was_promised(counts, size, share):
    members = make_members(counts)
    selection = select(scan_of(members), counts, sizes=(size,), answer_share=share)
    found = kept(members, selection, 0)
    balanced = kept(members, select(scan_of(members), counts, answer_share=share), 0)
    assert min(size, balanced.total()) <= found.total() <= size + 3  # less than one for each task
    tasks = by_task(found)
    cut = [task for task, n in by_task(balanced).items() if tasks[task] < n]
    assert len({tasks[task] for task in cut}) <= 1
    for task, n in by_task(balanced).items():
        answers = [c for (t, _), c in balanced.items() if t == task]
        if share is not None and len(answers) > 1 and max(answers) > min(answers):
            assert max(answers) <= max(share * n + 1, 1)
