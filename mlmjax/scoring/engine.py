"""Run token sequences of any length through one jitted function."""

import logging
import numbers
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlmjax.errors import InputError, RunError
from mlmjax.model.layers import Linear
from mlmjax.model.modernbert import Model
from mlmjax.model.vocabulary import check_rows
from mlmjax.parallel.processes import check_not_forked
from mlmjax.parallel.sharding import (
    batch_sharding,
    leaf_path,
    local_mesh,
    place,
    replicated_sharding,
)
from mlmjax.reporting.terminal import describe_compiling
from mlmjax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
MOST_ROWS = 65536
EXACT_SHARE = 16
"""Batches of an exact engine have this fraction of the usual tokens."""
Advance = Callable[[int], None]
"""Called with the number of items done since its last call."""

# Seconds that XLA took per layer for a forward pass on two cores of an AMD EPYC.
COMPILE_SECONDS = 0.5

Forward = Callable[..., Any]
"""From a model, ids and segment ids `[batch, seq]`, columns `[batch, ...]`, to `[batch, ...]`.

It has to be hashable; equal ones share compiled programs.
"""


def describe_forward_compiling(layers: int) -> str:
    """Say how long the first compilation of a model's forward pass takes."""
    return describe_compiling(COMPILE_SECONDS * layers)


def bucket_lengths(max_length: int) -> tuple[int, ...]:
    """Return the lengths that sequences are padded to: four per doubling, up to `max_length`.

    >>> bucket_lengths(300)
    (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 300)
    """
    lengths = [32, 48]
    octave = 64
    while octave < max_length:
        lengths += [octave + quarter * octave // 4 for quarter in range(4)]
        octave *= 2
    return (*(length for length in lengths if length < max_length), max_length)


def describe_limit(most: int, longest: int, owner: str) -> str:
    """Say how many tokens fit, and whether that is what the model reads or what `owner` sets.

    >>> describe_limit(512, 512, "the classifier"), describe_limit(96, 8192, "the classifier")
    ('512 tokens, all that the model reads', '96 tokens, the max_length of the classifier')
    """
    whose = "all that the model reads" if most == longest else f"the max_length of {owner}"
    return f"{most:,} tokens, {whose}"


class Engine:
    """Run `forward`, jitted, over token sequences of any length.

    Sequences are padded to one of `buckets`. A batch of a bucket has a fixed number of rows
    (`batch_size`, or as many as fill a token budget), sharded over all local devices. A sequence
    that comes alone is its own batch unless the full batch is compiled already, so there are at
    most two compilations per bucket. If the devices have no memory for a batch, it is halved for
    good. `forward` must give each row a result that does not depend on the other rows. `max_length`
    is the model's `max_position_embeddings` by default. Raises `InputError` for bad options.

    With `exact`, each bucket has one program and holds only sequences of its own, so a sequence has
    the same result to the last bit whatever runs beside it. Its batches are smaller, because a
    sequence that comes alone takes a whole one.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        forward: Forward,
        *,
        max_length: int | None = None,
        batch_size: int | None = None,
        exact: bool = False,
    ):
        check_rows(tokenizer, model.config.vocab_size)
        if batch_size is not None and not (
            isinstance(batch_size, numbers.Integral) and 1 <= batch_size <= MOST_ROWS
        ):
            raise InputError(
                f"batch_size is {batch_size!r:.60}; expected at least 1, at most {MOST_ROWS}"
            )
        longest = model.config.max_position_embeddings
        if max_length is not None and not 0 < max_length <= longest:
            raise InputError(
                f"max_length is {max_length}; expected 1 to {longest}, the positions of the model"
            )
        self.model, self.pad_id, self.batch_size = model, tokenizer.pad_id, batch_size
        self.exact = exact
        self.buckets = bucket_lengths(max_length or longest)
        self._shapes: set[tuple[int, int]] = set()
        self.real_tokens = self.padded_tokens = 0
        self.mesh = local_mesh(batch_size)
        self._halvings = 0
        self._placed: tuple[list[Any], Any] = ([], None)
        self.jitted = _jitted(nnx.split(model)[0], forward)

    @property
    def compilations(self) -> int:
        """Return the number of batch shapes so far, each of which is one program."""
        return len(self._shapes)

    @property
    def padding_share(self) -> float:
        """Return the share of padding among all tokens that the model has read."""
        return 1.0 - self.real_tokens / self.padded_tokens if self.padded_tokens else 0.0

    def run(
        self,
        sequences: Sequence[Sequence[int]],
        *columns: np.ndarray,
        progress: Advance | None = None,
    ) -> Any:
        """Return the results of `forward` in the order of the sequences, `[sequences, ...]`.

        `columns` are more arrays with one entry per sequence. There must be at least one sequence.
        Raises `RunError` if the devices' memory does not hold even one sequence each.
        """
        check_not_forked()
        lengths = np.array([len(ids) for ids in sequences])
        order = np.argsort(-lengths, kind="stable")
        results: Any = None
        done = 0
        while done < len(order):
            try:
                for members, scored in self._in_flight(sequences, lengths, order[done:], columns):
                    if results is None:
                        results = jax.tree.map(
                            lambda a: np.empty((len(order), *a.shape[1:]), a.dtype), scored
                        )
                    for into, values in zip(*map(jax.tree.leaves, (results, scored)), strict=True):
                        into[members] = values[: len(members)]
                    done += len(members)
                    if progress:
                        progress(len(members))
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                self._halve(int(lengths[order[done]]), len(sequences), error)
        return results

    def run_tokens(
        self, sequences: Sequence[Sequence[int]], *, progress: Advance | None = None
    ) -> list[np.ndarray]:
        """Return the results of a `forward` that gives `[batch, seq, ...]`, one array per sequence.

        Each array has as many rows as its sequence has tokens. Sequences of one bucket run
        together.
        """
        lengths = np.array([len(ids) for ids in sequences])
        buckets = np.searchsorted(self.buckets, lengths)
        found: list[Any] = [None] * len(sequences)
        for bucket in np.unique(buckets)[::-1]:
            members = np.flatnonzero(buckets == bucket).tolist()
            values = self.run([sequences[i] for i in members], progress=progress)
            for i, own in zip(members, values, strict=True):
                found[i] = own[: lengths[i]]
        return found

    def rows_of(self, length: int, sequences: int) -> int:
        """Return the rows of a batch of this length, a multiple of the devices."""
        devices = self.mesh.size
        share = EXACT_SHARE if self.exact else 1
        rows = self.batch_size or rows_per_device(length, share=share) * devices
        rows = -(-max(1, rows >> self._halvings) // devices) * devices
        # Compiling the full batch takes longer than its rows, running it longer than one text.
        is_alone = sequences == 1 and self.batch_size is None and not self.exact
        return devices if is_alone and (rows, length) not in self._shapes else rows

    def _halve(self, length: int, sequences: int, error: Exception) -> None:
        bucket = self._bucket(length)
        rows = self.rows_of(bucket, sequences)
        if rows == self.mesh.size:
            raise RunError(
                f"the devices' memory does not hold one text of {length} tokens each; give a "
                "smaller max_length, dtype bfloat16, or a device with more memory"
            ) from error
        while (fewer := self.rows_of(bucket, sequences)) == rows:
            self._halvings += 1
        message = "not enough memory for %d rows of %d tokens; continuing with %d rows"
        log.info(message, rows, length, fewer)

    def _bucket(self, length: int) -> int:
        return self.buckets[np.searchsorted(self.buckets, length)]

    def _below(self, bucket: int) -> int:
        """Return the next shorter bucket, or 0."""
        return (0, *self.buckets)[self.buckets.index(bucket)]

    def _in_flight(
        self,
        sequences: Sequence[Sequence[int]],
        lengths: np.ndarray,
        order: np.ndarray,
        columns: Sequence[np.ndarray],
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """Yield `(indices, results)` of batches; one runs while the next is laid out.

        The longest sequences come first. A batch is filled with the next shorter ones even if they
        fit a smaller bucket, so that only the last batch has rows of padding. An exact engine fills
        no batch with sequences of other buckets.
        """
        state = self._state()
        waiting = None
        while len(order):
            length = self._bucket(lengths[order[0]])
            rows = self.rows_of(length, len(sequences))
            count = rows
            if self.exact:  # the lengths are descending
                count = int((lengths[order[:rows]] > self._below(length)).sum())
            members, order = order[:count], order[count:]
            ids = np.full((rows, length), self.pad_id, np.int32)
            segment_ids = np.zeros((rows, length), np.int32)
            for row, member in enumerate(members):
                ids[row, : lengths[member]] = sequences[member]
                segment_ids[row, : lengths[member]] = 1
            # Unused rows repeat the first row's columns; their results are dropped.
            filled = np.resize(members, rows)
            filled[len(members) :] = members[0]
            self.real_tokens += int(lengths[members].sum())
            self.padded_tokens += rows * length
            self._shapes.add((rows, length))
            arrays = (ids, segment_ids, *(column[filled] for column in columns))
            with jax.set_mesh(self.mesh):
                placed = jax.device_put(arrays, batch_sharding(self.mesh))
                scored = members, self.jitted(state, *placed)
            if waiting:
                yield waiting[0], jax.device_get(waiting[1])
            waiting = scored
        if waiting:
            yield waiting[0], jax.device_get(waiting[1])

    def _state(self) -> Any:
        """Return the model's parameters on all devices; only changed ones are placed again."""
        _, state = nnx.split(self.model)
        leaves = jax.tree.leaves(state)
        known, placed = self._placed
        if len(leaves) != len(known) or any(a is not b for a, b in zip(leaves, known, strict=True)):
            rounded = as_computed(self.model, state)
            placed = place(rounded, jax.tree.map(lambda _: replicated_sharding(self.mesh), state))
            self._placed = leaves, placed
        return placed


def as_computed(model: Model, state: Any) -> Any:
    """Round the weights of matrix products once, instead of in every batch.

    `state` holds the model's parameters or their shapes.
    """
    products = {
        ".".join(map(str, (*path, "weight")))
        for path, module in nnx.iter_graph(model)
        if isinstance(module, Linear) and model.dtype != jnp.float32
    }

    def rounded(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf.astype(model.dtype) if leaf_path(path) in products else leaf

    return jax.tree_util.tree_map_with_path(rounded, state)


@lru_cache(maxsize=64)
def _jitted(graphdef: Any, forward: Forward) -> Any:
    """Return the jitted call; engines of equal graphs and forwards share compiled programs."""
    return jax.jit(lambda state, *arrays: forward(nnx.merge(graphdef, state), *arrays))


def rows_per_device(length: int, platform: str | None = None, *, share: int = 1) -> int:
    """Return the default number of rows on one device for sequences of this length.

    A CPU's matrix products reach full speed at about 1024 tokens. `platform` defaults to JAX's.
    `share` divides the tokens of a batch.
    """
    budget = 1024 if (platform or jax.default_backend()) == "cpu" else 65536
    return max(1, budget // share // length)
