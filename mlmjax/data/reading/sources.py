"""Read the records of a configured source: local files by glob, or a hub dataset."""

import glob
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Any

from mlmjax.config.columns import Column, look_up, look_up_or_none
from mlmjax.config.data import ALL_SUBSETS, Location
from mlmjax.data.reading.files import (
    BROKEN_RECORD,
    Broken,
    Record,
    name_classes,
    read_file,
    require_columns,
    stop,
)
from mlmjax.errors import InputError, first_line, named_place
from mlmjax.storage import check_regular

log = logging.getLogger(__name__)


def source_files(source: Location) -> list[Path]:
    """List the local files of a source, sorted within a glob; none for the hub.

    In a glob, `**` reaches into folders. Raises `InputError` if no file matches, for a file that
    two paths match, and for a pipe.
    """
    files: list[Path] = []
    for path in source.paths:
        names = [path] if Path(path).is_file() else glob.glob(path, recursive=True)
        for name in names:
            check_regular(Path(name))
        found = sorted(file for file in map(Path, names) if file.is_file())
        if not found:
            what = "is a folder" if Path(path).is_dir() else "no file matches"
            raise InputError(
                f"{path}: {what}; expected a file or a glob such as 'data/*.parquet' (relative to "
                "the working directory)"
            )
        if doubled := [file for file in found if file in files]:
            raise InputError(
                f"{path}: {doubled[0]} also matches another path of the source; name every file "
                "once"
            )
        files += found
    return files


def read_source(
    source: Location,
    names: Collection[str] | None = None,
    *,
    optional: Collection[str] = (),
    named: Collection[str] = (),
    unnamed: Collection[str] = (),
    broken: Broken = stop,
) -> Iterator[Record]:
    """Stream the first `limit` records of a source, file by file in sorted order.

    The fields of a record are `names`, each with the value of the column that `source.columns`
    gives for it, or of the column of that name (`config.columns.look_up`); None: all columns.
    The fields `optional` are None where there is no such column. Class numbers in the columns
    `named` become names, if the data have them, except those in `unnamed`. Raises `InputError`
    with file and line or row; for a hub dataset, with its id and row. `broken` is that of
    `read_file`; errors of a hub dataset are always raised.
    """
    columns = None if names is None else {name: source.columns.get(name, name) for name in names}
    wanted = None if columns is None else tuple(columns.values())
    spare = {name: source.columns.get(name, name) for name in optional}
    if source.hub is not None:
        records = _read_hub(source, wanted, tuple(spare.values()), named, unnamed)
    else:
        records = (
            record
            for path in source_files(source)
            for record in read_file(
                path,
                wanted,
                optional=tuple(spare.values()),
                named=named,
                unnamed=unnamed,
                csv=source.csv,
                encoding=source.encoding,
                broken=broken,
            )
        )
    if columns is not None:
        records = _renamed(records, columns, spare, broken)
    return islice(records, source.limit)


def first_columns(source: Location) -> list[str]:
    """Return the columns of the first record that can be read of a source's files.

    There are none for the hub, where reading all columns takes another download.
    """
    if source.hub is not None:
        return []
    records = read_source(source, broken=lambda kind, error: None)
    return list(next((record.fields for record in records), ()))


def _renamed(
    records: Iterable[Record],
    columns: Mapping[str, Column],
    optional: Mapping[str, Column],
    broken: Broken,
) -> Iterator[Record]:
    for record in records:
        try:
            with named_place(record.where):
                fields = {name: look_up(record.fields, column) for name, column in columns.items()}
        except InputError as error:
            broken(BROKEN_RECORD, error)
        else:
            for name, column in optional.items():
                fields[name] = look_up_or_none(record.fields, column)
            yield Record(fields, record.where)


def _read_hub(
    source: Location,
    columns: Collection[Column] | None,
    optional: Collection[Column],
    named: Collection[str],
    unnamed: Collection[str],
) -> Iterator[Record]:
    # datasets imports jax when that is installed, and data modules must load without it.
    import datasets

    where = f"hub dataset {source.hub}"
    if source.subset == ALL_SUBSETS:
        try:
            found = datasets.get_dataset_config_names(source.hub, revision=source.revision)
        except Exception as error:
            raise _unreadable(where, error) from error
        for name in sorted(found):
            one = source.model_copy(update={"subset": name})
            yield from _read_hub(one, columns, optional, named, unnamed)
        return
    if not source.is_pinned:
        log.warning(
            "%s: revision is %r, not a commit, so rows may change between two runs",
            where,
            source.revision,
        )
    try:
        stream = datasets.load_dataset(
            source.hub,
            source.subset,
            data_dir=source.folder,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
        features = stream.features or {}
        if features and columns is not None:
            needed = require_columns(where, columns, features, optional)
            stream = stream.select_columns(needed)
        rows = iter(stream)
    except InputError:
        raise
    except Exception as error:
        raise _unreadable(where, error) from error
    names = {
        column: feature.names
        for column, feature in features.items()
        if column in named and isinstance(feature, datasets.ClassLabel)
    }
    for number in count(1):
        here = f"{where} {source.split} row {number}"
        try:
            fields: dict[str, Any] | None = next(rows, None)
        except Exception as error:
            raise _unreadable(here, error) from error
        if fields is None:
            return
        require_columns(here, columns, fields)
        yield Record(name_classes(fields, names, here, unnamed), here)


def _unreadable(where: str, error: Exception) -> InputError:
    """Turn the errors of `datasets`, which have many types, into one line."""
    return InputError(
        f"{where}: cannot be read: {first_line(error)}; check the id, subset, split and "
        "revision, and the connection"
    )
