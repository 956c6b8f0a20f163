"""Read tables strictly from TOML; name every unknown key and every wrong value."""

import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from mlmjax.errors import InputError, read_failed, suggest_name

MOST_LEVELS = 30
"""How deep the values of a table may be nested."""

Table = TypeVar("Table", bound=BaseModel)


class StrictTable(BaseModel):
    """Hold exactly the declared keys, frozen and without conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `from_dict`."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Decode plain values; raise `InputError` that names each wrong one."""
        return decode(cls, values, where or cls.__name__.lower())


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file into plain values; raise `InputError` that says where it is broken."""
    path = Path(path)
    try:
        # Editors on Windows begin a file with a byte order mark.
        return tomllib.loads(path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n"))
    except OSError as error:
        raise read_failed(path, error, "give the path of a TOML file") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is not UTF-8 text (byte {error.start + 1} of the file is "
            f"0x{error.object[error.start]:02x}); a TOML file is UTF-8: save it so"
        ) from error
    except (ValueError, RecursionError) as error:  # also a NUL in the path, and a giant number
        raise InputError(f"{path}: is not valid TOML: {error}") from error


def decode(table_type: type[Table], values: Mapping[str, Any], where: str) -> Table:
    """Decode plain values into a typed table; raise one `InputError` with every problem."""
    return check_values(table_type, _tuples(values, where), where)


def check_values(table_type: type[Table], values: Any, where: str, advice: str = "") -> Table:
    """Check values whose lists are as declared; raise one `InputError` with every problem."""
    try:
        return table_type.model_validate(values)
    except ValidationError as error:
        problems = _problems(table_type, values, error)
        raise InputError(f"{where}: {problems[0]}{advice}", problems[1:]) from error


def _tuples(value: Any, where: str, path: tuple[Any, ...] = ()) -> Any:
    """Turn lists into tuples, because strict validation rejects a list for a tuple.

    Raises `InputError` for a value that is nested too deep, and for text with half a character.
    """
    if len(path) > MOST_LEVELS:
        start = ".".join(map(str, path[:4]))
        raise InputError(
            f"{where}: {start}... is nested more than {MOST_LEVELS} levels deep; expected tables "
            "and lists of a run file"
        )
    if isinstance(value, Mapping):
        return {
            _whole(key, where, (*path, key)): _tuples(item, where, (*path, key))
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return tuple(_tuples(item, where, (*path, i)) for i, item in enumerate(value))
    return _whole(value, where, path)


def _whole(value: Any, where: str, path: Sequence[Any]) -> Any:
    """Return a value; raise `InputError` for text that UTF-8 cannot hold."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where}: {'.'.join(map(str, path))}: found {value!r:.60}, which holds "
                "half a character; expected UTF-8 text"
            ) from error
    return value


def shipped_names(kind: str) -> list[str]:
    """Return the names of the shipped files of a kind: task or suite."""
    shipped = files("mlmjax") / "assets" / f"{kind}s"
    return sorted(entry.name[:-5] for entry in shipped.iterdir() if entry.name.endswith(".toml"))


def find_file(kind: str, name_or_path: str | Path, others: Sequence[str] = ()) -> Path:
    """Return the path of a shipped task or suite, or of a TOML file.

    Raises `InputError` for an unknown name, with the nearest one; `others` are names of another
    kind that would also do.
    """
    name, shipped = str(name_or_path), shipped_names(kind)
    if name in shipped:
        return Path(str(files("mlmjax") / "assets" / f"{kind}s" / f"{name}.toml"))
    is_file = os.path.exists(name) and not os.path.isdir(name)  # or a pipe, which is read once
    if Path(name).suffix == ".toml" or is_file:
        return Path(name)
    known = sorted([*shipped, *others])
    raise InputError(
        f"{kind} {name!r}: is neither a shipped {kind} nor a .toml file; "
        f"{suggest_name(name, known)}shipped are {', '.join(known)}"
    )


def override(table: dict[str, Any], change: str) -> None:
    """Set one dotted key of plain values by `key=value`; raise `InputError` if impossible."""
    key, separator, text = change.partition("=")
    shown = repr(change) if len(change) < 100 else f"{change[:60]!r}..."
    if not separator or not key:
        raise InputError(f"override {shown}: expected key=value, as in data.batch_size=64")
    if not all(key.split(".")) or key.count(".") >= MOST_LEVELS:
        raise InputError(
            f"override {shown}: expected names between the dots of the key, at most {MOST_LEVELS}, "
            "as in data.batch_size=64"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # also a number of thousands of digits
        value = text
    *parents, last = key.split(".")
    here: Any = table
    for name in parents:
        here = _step_into(here, name, shown)
    if not isinstance(here, dict):
        raise InputError(f"override {shown}: {'.'.join(parents)} is a list; name an element")
    here[last] = value


def _step_into(here: Any, name: str, shown: str) -> Any:
    if isinstance(here, list):
        if not (name.isdecimal() and len(name) < 10 and int(name) < len(here)):
            raise InputError(
                f"override {shown}: found {name!r:.60}; expected an index of the list, from 0 and "
                f"below its length {len(here)}"
            )
        here = here[int(name)]
    else:
        here = here.setdefault(name, {})
    if not isinstance(here, dict | list):
        raise InputError(f"override {shown}: {name} is a value, not a table")
    return here


def list_differences(here: Any, there: Any, other: str) -> list[str]:
    """Describe how nested values differ by dotted key; empty tables and lists do not count.

    >>> list_differences({"a": {"b": 1}, "c": [{"d": 2}], "e": []}, {"a": {"b": 3}}, "the run has")
    ['a.b is 1, the run has 3', 'c.0.d is 2, the run has None']
    """
    here, there = _flatten(here), _flatten(there)
    return [
        f"{key} is {here.get(key)!r}, {other} {there.get(key)!r}"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key)
    ]


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {key: value}
    return {
        name: inner
        for part, item in items
        for name, inner in _flatten(item, f"{key}.{part}" if key else str(part)).items()
    }


def _problems(table_type: type[BaseModel], values: Any, error: ValidationError) -> list[str]:
    """Describe each wrong value once: the types of a union together, a parent not at all."""
    problems: dict[tuple[Any, ...], list[Any]] = {}
    for problem in error.errors():
        location = tuple(_named_in(values, problem["loc"], problem["type"]))
        problems.setdefault(location, []).append(problem)
    parents = {location[:end] for location in problems for end in range(len(location))}
    return [
        _describe(table_type, location, found)
        for location, found in problems.items()
        if location not in parents
    ]


def _describe(table_type: type[BaseModel], location: Sequence[Any], problems: list[Any]) -> str:
    problem = problems[0]
    where = ".".join(str(part) for part in location) + ": " if location else ""
    found = problem.get("input")
    if problem["type"] == "extra_forbidden":
        known = _keys_at(table_type, location[:-1])
        hint = suggest_name(str(location[-1]), known) or f"known here: {', '.join(known)}"
        return f"{where}unknown key; {hint.strip()}"
    if problem["type"] == "missing":
        return f"{where[:-2]} is missing; this key is required"
    if problem["type"] == "value_error":
        text = str(problem["ctx"]["error"])
        return f"{where[:-2]} {text}" if where and text.startswith("is ") else where + text
    named = [one["msg"].replace("Input should be ", "") for one in problems]
    expected = problem["msg"] if len(named) == 1 else f"Input should be {', or '.join(named)}"
    shown = f"{found!r:.200}"  # also a whole file may be given as a value
    return f"{where}found {shown} ({type(found).__name__}); {expected[0].lower()}{expected[1:]}"


def _named_in(values: Any, location: Sequence[Any], kind: str) -> Iterator[Any]:
    """Yield the keys and indices of a problem's location, without the types of unions."""
    here = values
    for number, part in enumerate(location, 1):
        is_missing = kind == "missing" and number == len(location)
        if isinstance(here, BaseModel):
            here = vars(here)
        items: Any = here if isinstance(here, Mapping) else {}
        if isinstance(here, list | tuple):
            items = dict(enumerate(here))
        if part in items or is_missing:
            here = items.get(part)
            yield part


def _keys_at(table_type: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Return the known keys of the table at a dotted location."""
    model: Any = table_type
    for part in location:
        if part not in getattr(
            model, "model_fields", ()
        ):  # An index into a list, or a key of a mapping.
            continue
        annotation = model.model_fields[part].annotation
        tables = (a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields"))
        model = next(tables, annotation)
    return list(getattr(model, "model_fields", ()))
