"""Open the loaders of a run, and give each process the rows its devices need."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mlmjax.config.run import RunConfig
from mlmjax.data.loader import LabelLoader, Loader
from mlmjax.data.manifest import MANIFEST, Manifest, read_manifest
from mlmjax.data.masking.maskers import LossMasker, make_masker
from mlmjax.data.rows import RowSource, open_rows
from mlmjax.data.schedule import RowSchedule, mask_rate, row_schedule
from mlmjax.parallel.sharding import batch_sharding
from mlmjax.storage import hash_file
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.training.objectives import masker_of
from mlmjax.training.step import AnyBatch

AnyLoader = Loader | LabelLoader


class Loaders(NamedTuple):
    """The batches of a run.

    `validation` has the held-out rows masked as in training, and `answers` has every held-out
    answer; both are None without held-out rows. `by_source` has for each held-out source its
    answers, and, if the run masks at random, all of it masked for MLM. It is empty if that adds
    nothing to `answers`, and for the classification head. `sha256` is the hash of `manifest`.
    `adaptive` is the masker of `train` if it follows the losses of validations.
    """

    train: AnyLoader
    validation: AnyLoader | None
    answers: AnyLoader | None
    by_source: Mapping[str, Sequence[AnyLoader]]
    manifest: Manifest
    sha256: str
    adaptive: LossMasker | None = None


def open_loaders(config: RunConfig, tokenizer: Tokenizer) -> Loaders:
    """Open the prepared rows of a run.

    Raises `InputError` as `rows.open_rows`, `Loader` and `objectives.masker_of`.
    """
    data, folder, objective = config.data, Path(config.data.rows), config.objective
    manifest = read_manifest(folder)
    weights = {source.title: source.share for source in data.sources}
    level = None if data.subset is None else data.select.sizes.index(data.subset)
    rows = {
        split: open_rows(folder, split, weights, level=level if split == "train" else None)
        for split in manifest.splits
    }

    train_masker = masker = masker_of(objective, tokenizer)
    adaptive = train_masker if isinstance(train_masker, LossMasker) else None
    if adaptive is not None:  # validations stay comparable
        masker = make_masker("token", tokenizer)

    def make(
        sources: Sequence[RowSource], batch_size: int | RowSchedule, **masking: Any
    ) -> AnyLoader:
        kind: Any = partial(Loader, **{"masker": masker, **masking})
        if config.head == "classification":
            kind = partial(LabelLoader, smoothing=objective.label_smoothing)
        return kind(
            sources,
            seed=config.seed,
            batch_size=batch_size,
            seq_length=data.seq_length,
            tokenizer=tokenizer,
        )

    sizes, rate = row_schedule(data, config.steps), mask_rate(objective, config.steps)
    train = make(
        rows.get("train", []), sizes, objective=objective, mask_rate=rate, masker=train_masker
    )
    held_out, size = rows.get("validation", []), data.batch_size // data.accumulate
    only_answers = objective.model_copy(update={"dummy_mlm_share": 0.0, "mlm_share": 0.0})
    only_mlm = only_answers.model_copy(update={"mlm_share": 1.0})
    masks = objective.dummy_mlm_share + objective.mlm_share > 0 or any(s.text for s in held_out)
    by_source: dict[str, list[AnyLoader]] = {}
    if config.head == "mlm" and (masks or len(held_out) > 1):
        for source in held_out:
            # Both objectives would draw the same masks in plain text.
            objectives = [only_answers, only_mlm] if masks and not source.text else [only_answers]
            by_source[source.name] = [make([source], size, objective=one) for one in objectives]
    return Loaders(
        train=train,
        validation=make(held_out, size, objective=objective) if held_out else None,
        answers=make(held_out, size, objective=only_answers) if held_out else None,
        by_source=by_source,
        manifest=manifest,
        sha256=hash_file(folder / MANIFEST),
        adaptive=adaptive,
    )


class Share(NamedTuple):
    """The rows of a batch that a process needs (int64, in order), and which of them it counts.

    If several processes need a row, one of them counts it.
    """

    rows: np.ndarray
    counts: np.ndarray


def feed(
    loader: AnyLoader,
    mesh: Mesh | None,
    start: int,
    stop: int,
    change: Callable[[Any], Any] = lambda batch: batch,
) -> Iterator[tuple[int, Any, AnyBatch]]:
    """Yield each step from `start` to before `stop`, its changed batch and its counted rows.

    The batch is on the devices of all processes. The rows that this process counts are on its host.
    """
    if mesh is None or not mesh.is_multi_process:
        for step, batch in loader.batches(start, stop):
            changed = change(batch)
            yield step, changed, changed
        return
    share = cache(lambda rows: share_of(mesh, rows, jax.process_index()))
    for step, batch in loader.batches(start, stop, lambda step: share(loader.rows(step)).rows):
        batch, size = change(batch), loader.rows(step)
        mine = share(size)
        counted = jax.tree.map(lambda x, keep=mine.counts: x[keep], batch)
        yield step, assemble(batch, mesh, mine.rows, size), counted


def share_of(
    mesh: Mesh,
    rows: int,
    process: int,
    process_of: Callable[[Any], int] = lambda device: device.process_index,
) -> Share:
    """Return which of `rows` rows the devices of a process need."""
    owner, is_needed = np.full(rows, -1), np.zeros(rows, bool)
    for device, index in batch_sharding(mesh).devices_indices_map((rows,)).items():
        owner[index] = np.where(owner[index] < 0, process_of(device), owner[index])
        is_needed[index] |= process_of(device) == process
    needed = np.flatnonzero(is_needed)
    return Share(needed, owner[needed] == process)


def assemble(batch: AnyBatch, mesh: Mesh, rows: np.ndarray, size: int) -> Any:
    """Make the global batch of `size` rows from those that each process has (`rows`)."""
    places, sharding = np.searchsorted(rows, np.arange(size)), batch_sharding(mesh)

    def place(x: np.ndarray) -> jax.Array:
        def piece(index: Any) -> np.ndarray:
            return x[places[index[0]]]

        return jax.make_array_from_callback((size, *x.shape[1:]), sharding, piece)

    return jax.tree.map(place, batch)
