"""Select some of many examples, by caps, shares of answers, and nested sizes."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

BITS = 8
"""Examples are first counted in 2**BITS bins of their hash, so that memory stays bounded."""

LEFT_OUT = UNBALANCED = 254
CAPPED = 255
"""In place of a level, which is smaller: the answer is too common, or the task is at its cap."""


def mix(values: np.ndarray) -> np.ndarray:
    """Return 64-bit hashes of 64-bit numbers, one to one (the last steps of SplitMix64).

    >>> len(set(mix(np.arange(1000, dtype=np.uint64)).tolist()))
    1000
    """
    x = values + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Members(NamedTuple):
    """Describe examples by task, token of the answer, and hash, each `[examples]`."""

    task: np.ndarray
    answer: np.ndarray
    key: np.ndarray

    @property
    def cap_key(self) -> np.ndarray:
        """Return another hash, because the limit on an answer leaves it only low keys."""
        return mix(~self.key)


Scan = Callable[[], Iterable[Members]]
"""Goes through all examples from the beginning, some at a time."""


class Selection(NamedTuple):
    """Hold thresholds on the hash: by (task, answer) for common answers, by level and task.

    An example is in a level if its hash is below both. `per_task` has the most of any task for each
    level. `one_answer` counts the tasks that have a single answer.
    """

    answers: Mapping[tuple[int, int], int]
    caps: np.ndarray
    per_task: list[int]
    one_answer: int

    def levels(self, members: Members) -> np.ndarray:
        """Return the lowest level each example is in, or why in none: uint8 `[examples]`."""
        below = members.cap_key[None, :] <= self.caps[:, members.task]
        level = np.where(below.any(axis=0), below.argmax(axis=0), CAPPED).astype(np.uint8)
        level[~_is_balanced(members, self.answers)] = UNBALANCED
        return level


def select(
    scan: Scan,
    counts: Mapping[tuple[int, int], int],
    *,
    sizes: Sequence[int | None] = (None,),
    per_task: int | None = None,
    answer_share: float | None = None,
) -> Selection:
    """Select nested sets of examples by their hashes; the same examples give the same sets.

    `counts` has the number of examples by task and answer token. First, in every task with two or
    more answers, the most common answers are thinned out until none has more than `answer_share`
    of what is left (or, with too few answers for that, as many as the rarest). Then every task is
    capped at `per_task`, and for each size (None: no limit) at the lowest number that makes the set
    that large, so that the largest tasks are cut to one common number. A smaller set is a part of
    every larger one. Examples of equal hash stay together.
    """
    tasks = 1 + max((task for task, _ in counts), default=-1)
    limits = _balance(counts, answer_share)
    answers = _find_answers(scan, limits)
    kept, different = np.zeros((2, tasks), np.int64)
    for (task, answer), count in counts.items():
        different[task] += 1
        kept[task] += limits.get((task, answer), count)
    wanted = np.stack([_cap(kept, size, per_task) for size in sizes])
    caps = _find_caps(scan, answers, wanted, kept)
    most = wanted.max(axis=1, initial=0).tolist()
    return Selection(answers, caps, most, int((different == 1).sum()))


def _balance(
    counts: Mapping[tuple[int, int], int], share: float | None
) -> dict[tuple[int, int], int]:
    """Return how many to keep of every answer that is too common in its task.

    >>> _balance({(0, 7): 90, (0, 8): 10, (0, 9): 20, (1, 7): 50}, 0.5)
    {(0, 7): 30}
    """
    if share is None:
        return {}
    by_task: dict[int, list[int]] = {}
    for (task, _), count in counts.items():
        by_task.setdefault(task, []).append(count)
    most: dict[int, int] = {}
    for task, sizes in by_task.items():
        ordered, k = np.sort(sizes), np.arange(1, len(sizes))
        k = k[k * share < 1]
        # With the k most common answers cut to m each, m = share (rest + k m).
        m = share * np.cumsum(ordered)[-k - 1] / (1 - k * share)
        found = m[m >= ordered[-k - 1]]
        most[task] = max(int(found[0]), 1) if len(found) else int(ordered[0])
    return {group: most[group[0]] for group, count in counts.items() if count > most[group[0]]}


def _cap(kept: np.ndarray, size: int | None, per_task: int | None) -> np.ndarray:
    """Return how many of each task make a set of at least `size`, or all.

    >>> _cap(np.array([100, 10, 50]), 90, None).tolist()
    [40, 10, 40]
    """
    capped = kept if per_task is None else np.minimum(kept, per_task)
    if size is None or size >= capped.sum():
        return capped
    caps = range(int(capped.max()))
    return np.minimum(capped, bisect_left(caps, size, key=lambda n: np.minimum(capped, n).sum()))


def _find_answers(scan: Scan, limits: Mapping[tuple[int, int], int]) -> dict[tuple[int, int], int]:
    """Return the thresholds that leave so many of each answer."""
    if not limits:
        return {}
    slots = {group: slot for slot, group in enumerate(limits)}
    found = _find_smallest(
        scan,
        key_of=lambda members: members.key,
        slot_of=lambda members: _look_up(members, slots, -1, np.int64),
        wanted=np.array([list(limits.values())]),
    )
    return {group: int(found[0, slot]) for group, slot in slots.items()}


def _find_caps(
    scan: Scan, answers: Mapping[tuple[int, int], int], wanted: np.ndarray, kept: np.ndarray
) -> np.ndarray:
    """Return the thresholds that leave `wanted` of each level and task, `[levels, tasks]`."""
    caps = np.where(wanted < kept, np.uint64(0), np.uint64(2**64 - 1))
    (cut,) = np.nonzero((wanted < kept).any(axis=0))
    if len(cut):
        slots = np.full(len(kept), -1)
        slots[cut] = np.arange(len(cut))
        found = _find_smallest(
            scan,
            key_of=lambda members: members.cap_key,
            slot_of=lambda members: np.where(
                _is_balanced(members, answers), slots[members.task], -1
            ),
            wanted=wanted[:, cut],
        )
        caps[:, cut] = np.where(wanted[:, cut] < kept[cut], found, caps[:, cut])
    return caps


def _find_smallest(
    scan: Scan,
    key_of: Callable[[Members], np.ndarray],
    slot_of: Callable[[Members], np.ndarray],
    wanted: np.ndarray,
) -> np.ndarray:
    """Return for each level and slot the `wanted`-th smallest hash, uint64 `[levels, slots]`."""
    levels, slots = wanted.shape
    # The first of two passes counts in bins, the second reads the bins of the results.
    bins = np.zeros((slots, 2**BITS), np.int64)
    shift = np.uint64(64 - BITS)
    for members in scan():
        slot, key = slot_of(members), key_of(members)
        used = slot >= 0
        np.add.at(bins, (slot[used], (key[used] >> shift).astype(np.int64)), 1)
    filled = np.cumsum(np.pad(bins, ((0, 0), (1, 0))), axis=1)
    edge = np.stack([(filled[:, 1:-1] < row[:, None]).sum(axis=1) for row in wanted])
    before = filled[np.arange(slots), edge]
    held: dict[tuple[int, int], list[np.ndarray]] = {}
    for members in scan():
        slot, key = slot_of(members), key_of(members)
        where = (key >> shift).astype(np.int64)
        for level in range(levels):
            (near,) = np.nonzero((slot >= 0) & (where == edge[level, np.maximum(slot, 0)]))
            for one in np.unique(slot[near]).tolist():
                held.setdefault((level, one), []).append(key[near[slot[near] == one]])
    found = np.zeros((levels, slots), np.uint64)
    for place, parts in held.items():
        rank = int(wanted[place] - before[place])
        values = np.sort(np.concatenate(parts))
        found[place] = values[min(rank, len(values)) - 1] if rank > 0 else 0
    return found


def _is_balanced(members: Members, answers: Mapping[tuple[int, int], int]) -> np.ndarray:
    return members.key <= _look_up(members, answers, 2**64 - 1, np.uint64)


def _look_up(
    members: Members, values: Mapping[tuple[int, int], int], default: int, dtype: type
) -> np.ndarray:
    """Return the value for each (task, answer), group by group because groups are few."""
    if not values:
        return np.full(len(members.key), default, dtype)
    code = members.task.astype(np.int64) << 32 | (members.answer.astype(np.int64) + 1)
    groups, inverse = np.unique(code, return_inverse=True)
    found = [values.get((int(g) >> 32, (int(g) & (2**32 - 1)) - 1), default) for g in groups]
    return np.array(found, dtype)[inverse]
