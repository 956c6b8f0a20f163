"""Which examples are kept of many: caps by task, a limit on one answer's share, nested sizes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

BITS = 8
"""Examples are first counted in 2**BITS bins of their hash, so memory does not grow with them."""

UNBALANCED, CAPPED = 254, 255
"""In place of the level, for what is left out: too common an answer, or above its task's cap."""

LEFT_OUT = UNBALANCED
"""Numbers of levels are below."""


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
    """What selecting looks at: for each example, its task, its answer's token and its hash."""

    task: np.ndarray
    answer: np.ndarray
    key: np.ndarray

    @property
    def cap_key(self) -> np.ndarray:
        """Another hash: those of an answer that was thinned out have low keys, all of them."""
        return mix(~self.key)


Scan = Callable[[], Iterable[Members]]
"""Goes through all examples from the beginning, some at a time."""


class Selection(NamedTuple):
    """Thresholds on the hash: by (task, answer) for dominating answers, by level and task for caps.

    An example is in a level when its hash is below both. `sizes` tells how many are, `per_task`
    the most of any task, `one_answer` how many tasks have a single answer.
    """

    answers: Mapping[tuple[int, int], int]
    caps: np.ndarray
    sizes: list[int]
    per_task: list[int]
    one_answer: int

    def levels(self, members: Members) -> np.ndarray:
        """Return the lowest level each example is in, or why in none: uint8 `[examples]`."""
        below = members.cap_key[None, :] <= self.caps[:, members.task]
        level = np.where(below.any(axis=0), below.argmax(axis=0), CAPPED).astype(np.uint8)
        level[~self._balanced(members)] = UNBALANCED
        return level

    def _balanced(self, members: Members) -> np.ndarray:
        return members.key <= _thresholds(members, self.answers)


def select(
    scan: Scan,
    counts: Mapping[tuple[int, int], int],
    *,
    sizes: Sequence[int | None] = (None,),
    per_task: int | None = None,
    answer_share: float | None = None,
) -> Selection:
    """Choose the examples of nested sets by their hashes; the same examples, the same choice.

    `counts` has the number of examples by task and answer token. First, in every task of two or
    more answers, the commonest answers are thinned out until none has more than `answer_share` of
    what is left (or, where there are too few answers for that, as many as the rarest). Then every
    task is capped at `per_task`, and for each size (None: no limit) at the lowest number that makes
    the set that large: what is cut are the largest tasks, down to one common number. A smaller set
    is a part of every larger one. Examples of equal hash stay together.
    """
    tasks = 1 + max((task for task, _ in counts), default=-1)
    limits = _balance(counts, answer_share)
    answers = _find_answers(scan, limits)
    kept = np.zeros(tasks, np.int64)
    different = np.zeros(tasks, np.int64)
    for (task, answer), count in counts.items():
        different[task] += 1
        kept[task] += limits.get((task, answer), count)
    wanted = np.stack([_cap(kept, size, per_task) for size in sizes])
    caps = _find_caps(scan, answers, wanted, kept)
    sizes_found, most = wanted.sum(axis=1).tolist(), wanted.max(axis=1, initial=0).tolist()
    return Selection(answers, caps, sizes_found, most, int((different == 1).sum()))


def _balance(
    counts: Mapping[tuple[int, int], int], share: float | None
) -> dict[tuple[int, int], int]:
    """Return how many to keep of every answer that dominates its task.

    >>> _balance({(0, 7): 90, (0, 8): 10, (0, 9): 20, (1, 7): 50}, 0.5)
    {(0, 7): 30}
    """
    by_task: dict[int, list[int]] = {}
    for (task, _), count in counts.items():
        by_task.setdefault(task, []).append(count)
    most: dict[int, int] = {}
    for task, sizes in by_task.items() if share is not None else ():
        ordered = np.sort(np.array(sizes))
        if len(ordered) < 2:
            continue
        # With the k commonest answers cut to m each, m = share (rest + k m).
        assert share is not None
        most[task] = int(ordered[0])
        for k in range(1, len(ordered)):
            if k * share >= 1:
                break
            m = share * ordered[: len(ordered) - k].sum() / (1 - k * share)
            if m >= ordered[-k - 1]:
                most[task] = max(int(m), 1)
                break
    return {
        group: most[group[0]]
        for group, count in counts.items()
        if count > most.get(group[0], count)
    }


def _cap(kept: np.ndarray, size: int | None, per_task: int | None) -> np.ndarray:
    """Return how many of each task make a set of at least `size` (all, where there are fewer).

    >>> _cap(np.array([100, 10, 50]), 90, None).tolist()
    [40, 10, 40]
    """
    capped = kept if per_task is None else np.minimum(kept, per_task)
    if size is None or size >= capped.sum():
        return capped
    low, high = 0, int(capped.max())
    while low < high:
        middle = (low + high) // 2
        if np.minimum(capped, middle).sum() >= size:
            high = middle
        else:
            low = middle + 1
    return np.minimum(capped, low)


def _find_answers(scan: Scan, limits: Mapping[tuple[int, int], int]) -> dict[tuple[int, int], int]:
    slots = {group: slot for slot, group in enumerate(limits)}
    if not slots:
        return {}

    def slot_of(members: Members) -> np.ndarray:
        return _lookup(members, slots, -1)

    found = _smallest(scan, lambda m: m.key, slot_of, np.array([list(limits.values())]))
    return {group: int(found[0, slot]) for group, slot in slots.items()}


def _find_caps(
    scan: Scan, answers: Mapping[tuple[int, int], int], wanted: np.ndarray, kept: np.ndarray
) -> np.ndarray:
    caps = np.where(wanted < kept, np.uint64(0), np.uint64(2**64 - 1))
    (cut,) = np.nonzero((wanted < kept).any(axis=0))
    if not len(cut):
        return caps
    slot_of_task = np.full(len(kept), -1)
    slot_of_task[cut] = np.arange(len(cut))

    def slot_of(members: Members) -> np.ndarray:
        balanced = members.key <= _thresholds(members, answers)
        return np.where(balanced, slot_of_task[members.task], -1)

    found = _smallest(scan, lambda m: m.cap_key, slot_of, wanted[:, cut])
    caps[:, cut] = np.where(wanted[:, cut] < kept[cut], found, caps[:, cut])
    return caps


def _smallest(
    scan: Scan,
    key_of: Callable[[Members], np.ndarray],
    slot_of: Callable[[Members], np.ndarray],
    wanted: np.ndarray,
) -> np.ndarray:
    """Return for each level and slot the `wanted`-th smallest hash, uint64 `[levels, slots]`.

    Two passes: one counts in bins, the other reads the bin each answer lies in.
    """
    levels, slots = wanted.shape
    bins = np.zeros((slots, 2**BITS), np.int64)
    shift = np.uint64(64 - BITS)
    for members in scan():
        slot, key = slot_of(members), key_of(members)
        used = slot >= 0
        np.add.at(bins, (slot[used], (key[used] >> shift).astype(np.int64)), 1)
    filled = np.cumsum(bins, axis=1)
    edge = np.stack([(filled < row[:, None]).sum(axis=1) for row in wanted])
    edge = np.minimum(edge, 2**BITS - 1)
    before = np.where(edge > 0, filled[np.arange(slots), np.maximum(edge - 1, 0)], 0)
    held: dict[tuple[int, int], list[np.ndarray]] = {}
    for members in scan():
        slot, key = slot_of(members), key_of(members)
        where = (key >> shift).astype(np.int64)
        for level in range(levels):
            (near,) = np.nonzero((slot >= 0) & (where == edge[level, np.maximum(slot, 0)]))
            for one in np.unique(slot[near]).tolist():
                held.setdefault((level, one), []).append(key[near[slot[near] == one]])
    found = np.zeros((levels, slots), np.uint64)
    for (level, slot_number), parts in held.items():
        rank = int(wanted[level, slot_number] - before[level, slot_number])
        values = np.sort(np.concatenate(parts))
        found[level, slot_number] = values[min(rank, len(values)) - 1] if rank > 0 else 0
    return found


def _thresholds(members: Members, answers: Mapping[tuple[int, int], int]) -> np.ndarray:
    return _lookup(members, answers, 2**64 - 1, np.uint64)


def _lookup(
    members: Members,
    values: Mapping[tuple[int, int], int],
    default: int,
    dtype: type = np.int64,
) -> np.ndarray:
    """Look up a value by (task, answer), group by group: a chunk has few of those."""
    result: np.ndarray = np.full(len(members.key), default, dtype)
    if not values:
        return result
    code = members.task.astype(np.int64) << 32 | (members.answer.astype(np.int64) + 1)
    groups, inverse = np.unique(code, return_inverse=True)
    found = [values.get((int(g) >> 32, (int(g) & (2**32 - 1)) - 1), default) for g in groups]
    return np.array(found, dtype)[inverse]
