"""Find the folder of a model: a path, the packaged model or the hub; push a folder to the hub."""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import resources
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors

from mlmjax.errors import InputError, first_line
from mlmjax.reporting.terminal import say, working
from mlmjax.reporting.verbosity import is_quiet
from mlmjax.storage import (
    ADAPTER_BASE,
    CARD,
    CLASSIFIER,
    CONFIG,
    DECIDER,
    EMBEDDING_FILES,
    MAX_JSON_BYTES,
    PROVENANCE,
    TOKENIZER_FILES,
    expand_home,
    find_moved_away,
    plain_file,
    read_bounded,
    read_json,
)
from mlmjax.weights.tensors.tensor_files import ADAPTER, ADAPTER_CONFIG, INDEX, WEIGHTS, weight_map

PACKAGED = "mlmjax-small"
"""The name of the model inside this package."""
OTHER_TOKENIZER_FILES = ("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")
EXPORT_FILES = frozenset(
    {CONFIG, INDEX, ADAPTER_CONFIG, ADAPTER_BASE, CLASSIFIER, DECIDER, *PROVENANCE}
    | {"generation_config.json", ".gitattributes"}
    | {"*.safetensors", "2_Normalize"}
    | {name.partition("/")[0] for name in EMBEDDING_FILES}
    | set(TOKENIZER_FILES + OTHER_TOKENIZER_FILES)
)
"""Files of a model or an adapter, which another export may replace."""
_FOLDERS = frozenset(
    {"2_Normalize", *(one.partition("/")[0] for one in EMBEDDING_FILES if "/" in one)}
)
_NOT_PUSHED = frozenset({".gitattributes"})  # the hub has its own

# Reasons of the hub in words; the first class that matches counts.
_HUB_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (hub_errors.HFValidationError, "and it is not a valid hub id (organisation/name)"),
    (hub_errors.GatedRepoError, "and the hub asks for permission: accept its terms, log in"),
    (hub_errors.RepositoryNotFoundError, "and the hub has no such model (or hides it: log in)"),
    (hub_errors.RevisionNotFoundError, "and the hub has no such revision of it"),
    (hub_errors.LocalEntryNotFoundError, "not in the cache, and the hub is unreachable"),
    (hub_errors.OfflineModeIsEnabled, "and the hub is switched off (HF_HUB_OFFLINE)"),
)


def fetch(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Path:
    """Return the folder of a model, which is local, packaged or downloaded from the hub.

    `mlmjax-small` is the packaged model; a folder of that name is `./mlmjax-small`. Only the
    configuration, tokenizer files, safetensors weights (unless `weights` is false), card, licence
    and the files that mlmjax adds are downloaded. Raises `InputError` for a path that is not a
    folder, an unknown id and an unreachable hub.
    """
    name = os.fspath(source)
    if not name.strip():
        raise InputError("the model's name is empty; give a folder or a hub id")
    path = expand_home(name)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name[:200]!r}: is not a usable path ({error}); give a folder"
        ) from error
    own = packaged_folder(name) if isinstance(source, str) else None
    if own and is_folder:
        raise InputError(
            f"{name}: is the packaged model and a folder; rename the folder, or give ./{name} for "
            "it"
        )
    if folder := path if is_folder else own:
        if revision is None:
            return folder
        what = "is the packaged model" if own else "is a folder"
        raise InputError(
            f"{name}: {what}, but revision {revision!r} names a version on the hub; "
            "leave the revision out, or give a hub id"
        )
    if exists:
        raise InputError(f"{name}: is a file; give the folder that holds {CONFIG} and the weights")
    if (moved := find_moved_away(path)) is not None:
        raise InputError(
            f"{name}: a process was killed while it replaced this folder; save again, or rename "
            f"{moved}, which is the one that was there"
        )
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "\\" in name:
        raise InputError(f"{name}: there is no such folder; give an existing folder or a hub id")
    small = [
        CONFIG,
        ADAPTER_CONFIG,
        ADAPTER_BASE,
        INDEX,
        CLASSIFIER,
        DECIDER,
        *EMBEDDING_FILES,
        *PROVENANCE,
        *TOKENIZER_FILES,
    ]
    folder = download(name, revision, local_files_only, small)
    if not weights:
        return folder
    files = _weight_files(folder)
    if not all((folder / file).exists() for file in files):
        # The folder of a snapshot is named by its commit, so both calls see the same version.
        folder = download(name, folder.name, local_files_only, files)
    return folder


def _weight_files(folder: Path) -> list[str]:
    """Return the names of the files of weights, of a folder that has all other files."""
    if (folder / ADAPTER_CONFIG).exists() and not (folder / CONFIG).exists():
        return [ADAPTER]
    return sorted(set((weight_map(folder) or {}).values())) or [WEIGHTS]


def packaged_folder(name: str) -> Path | None:
    """Return the folder of a packaged model; None for any other name.

    >>> packaged_folder("mlmjax-small").name
    'small'
    """
    return Path(str(resources.files("mlmjax"))) / "assets" / "small" if name == PACKAGED else None


def report_packaged(is_used: bool) -> None:
    """Say on stderr that the packaged model answers, because no other was named."""
    if is_used:
        say(f"no --model: using the packaged {PACKAGED}, a small model for trying things out")


def download(name: str, revision: str | None, local: bool, files: list[str]) -> Path:
    """Download the files of these patterns; return the snapshot or raise `InputError`."""
    try:
        with nullcontext() if local else _shown(f"downloading {name} from the hub"):
            return Path(
                huggingface_hub.snapshot_download(
                    name, revision=revision, local_files_only=local, allow_patterns=files
                )
            )
    except Exception as error:  # errors of the transport differ between versions
        reasons = (text for kind, text in _HUB_REASONS if isinstance(error, kind))
        reason = next(reasons, "and the hub cannot be used now")
        what = name if revision is None else f"{name} (revision {revision})"
        raise InputError(
            f"{what}: is not a local folder, {reason}; check the name or give a folder's path",
            [f"{type(error).__name__}: {first_line(error)}"],
        ) from error


def _shown(what: str) -> AbstractContextManager[Any]:
    """Show that the hub's client works; on a terminal it draws bars of bytes itself."""
    if is_quiet():
        huggingface_hub.utils.disable_progress_bars()
    return nullcontext() if sys.stderr.isatty() else working(what)


def push(
    folder: str | os.PathLike[str],
    name: str,
    *,
    private: bool = True,
    revision: str | None = None,
    card: str | None = None,
) -> str:
    """Upload the folder of a model, classifier, decider or adapter; return its address on the hub.

    Only the files that loading needs, the card and the licence files are uploaded. Such files of an
    earlier upload that the folder lacks are deleted there. The repository `name` is made if it is
    missing. `revision` is a branch, which is made, too. `card` replaces the text of README.md. The
    login is that of huggingface_hub.

    Raises `InputError` for a folder that is no model, for files that name a token or the home
    directory, for an adapter whose base is a folder, for a repository that is public if `private`,
    and for what the hub rejects.
    """
    path = expand_home(folder)
    if name.count("/") != 1:
        raise InputError(f"{name}: is not a hub id; expected organisation/name")
    files: dict[str, Path | bytes] = {**_files_to_push(path)}
    if card is not None:
        files[CARD] = card.encode()
    _check_public(path, files)
    left = sorted({entry.name for entry in path.iterdir()} - files.keys() - _NOT_PUSHED - _FOLDERS)
    if left:
        say(f"{path}: stays here: {', '.join(left)}")
    api, branch = huggingface_hub.HfApi(library_name="mlmjax"), revision or "main"
    with _reasons(name), _shown(f"uploading {path} to {name}"):
        _make_repository(api, name, private)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        there = {entry.rfilename for entry in api.model_info(name, revision=branch).siblings or ()}
        ours = {one for one in there if one in EXPORT_FILES or one.endswith(".safetensors")}
        gone = {one for one in ours if "/" not in one} - {*PROVENANCE, *_NOT_PUSHED, *files}
        commit = api.create_commit(
            name,
            [
                *(huggingface_hub.CommitOperationAdd(*file) for file in files.items()),
                *(huggingface_hub.CommitOperationDelete(one) for one in sorted(gone)),
            ],
            commit_message="Upload with mlmjax",
            revision=branch,
        )
    return f"{api.endpoint}/{name}/tree/{revision or commit.oid}"


def _files_to_push(folder: Path) -> dict[str, Path]:
    """Return the files of a model's folder by name; raise `InputError` if one is missing."""
    if (folder / "export" / CONFIG).exists():
        raise InputError(f"{folder}: is the folder of a run; push {folder / 'export'}")
    if not any((folder / one).exists() for one in (CONFIG, ADAPTER_CONFIG)):
        raise InputError(
            f"{folder}: holds neither {CONFIG} nor {ADAPTER_CONFIG}; give the folder of a model, "
            "such as one that save_pretrained wrote"
        )
    known = [*EXPORT_FILES - _NOT_PUSHED, *EMBEDDING_FILES]
    names = [*_weight_files(folder), *(one for one in known if os.path.lexists(folder / one))]
    places = {one: Path(one) for one in sorted(names) if one not in _FOLDERS}
    return {one: plain_file(folder / path.parent, path.name) for one, path in places.items()}


def _check_public(folder: Path, files: Mapping[str, Path | bytes]) -> None:
    """Raise `InputError` if a file says something that is only for this machine."""
    if ADAPTER_CONFIG in files:
        base = read_json(folder, ADAPTER_CONFIG).get("base_model_name_or_path")
        if isinstance(base, str) and (os.path.isabs(base) or expand_home(base).is_dir()):
            raise InputError(
                f"{folder}: is an adapter whose base is a folder of this machine ({base}), which "
                "others cannot load; push the base first and fit from its hub id, or save the "
                "whole model (merge=True)"
            )
    home, token = os.path.expanduser("~"), huggingface_hub.get_token()
    hidden = {"your token of the hub": re.escape(token) if token else None}
    hidden["what looks like a token of the hub"] = r"\bhf_[A-Za-z0-9]{30,}"
    place = str(folder.absolute().parent)
    hidden["the path of this folder"] = rf"{re.escape(place)}/" if place.count("/") > 1 else None
    hidden["the path of your home directory"] = rf"{re.escape(home)}\b" if len(home) > 1 else None
    for name, content in files.items():
        if name.endswith(".safetensors") or name in TOKENIZER_FILES[:1]:
            continue
        content = read_bounded(content, MAX_JSON_BYTES) if isinstance(content, Path) else content
        for what, pattern in hidden.items():
            if pattern and re.search(pattern.encode(), content):
                raise InputError(f"{folder / name}: holds {what}; remove it, then push again")


def _make_repository(api: huggingface_hub.HfApi, name: str, private: bool) -> None:
    """Make a repository; raise `InputError` if it is there and public against the wish."""
    try:
        is_private = api.model_info(name).private
    except hub_errors.RepositoryNotFoundError:
        api.create_repo(name, private=private)
        return
    if private and not is_private:
        raise InputError(
            f"{name}: exists on the hub and is public; give --public (private=False) to upload "
            "there, or give another name"
        )
    if is_private and not private:
        say(f"{name}: exists and stays private; its settings on the hub can make it public")


@contextmanager
def _reasons(name: str) -> Iterator[None]:
    """Turn what the hub rejects into an `InputError` in plain words."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # errors of the transport differ between versions
        cause: BaseException = error
        while not hasattr(cause, "response") and cause.__cause__ is not None:
            cause = cause.__cause__
        raise InputError(
            f"{name}: was not uploaded: {_push_reason(cause)}",
            [f"{type(cause).__name__}: {first_line(cause)}"],
        ) from error


def _push_reason(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub_errors.HFValidationError):
        return "this is not a valid hub id; expected organisation/name"
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return "the hub is switched off; unset HF_HUB_OFFLINE"
    if status in (401, 403, 404):
        if huggingface_hub.get_token() is None:
            return "nobody is logged in; run `hf auth login`, or set HF_TOKEN"
        return "the token may not write there; give a name of your own, or log in with write access"
    if status == 409:
        return "it exists already, or somebody writes to it now; try again, or give another name"
    if status == 400:
        return "the hub rejects the content; see the next line"
    if status is not None:
        return f"the hub answers with status {status}; try again later"
    return "the hub is unreachable; check the network and try again"
