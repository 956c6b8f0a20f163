"""Find the folder of a model: a path, the packaged model, or a download from the hub."""

import os
import sys
from contextlib import nullcontext
from importlib import resources
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from mlmjax.errors import InputError, first_line
from mlmjax.reporting.terminal import say, working
from mlmjax.reporting.verbosity import is_quiet
from mlmjax.storage import (
    ADAPTER_BASE,
    CLASSIFIER,
    CONFIG,
    DECIDER,
    EMBEDDING_FILES,
    PROVENANCE,
    TOKENIZER_FILES,
    expand_home,
    find_moved_away,
)
from mlmjax.weights.tensor_files import ADAPTER, ADAPTER_CONFIG, INDEX, WEIGHTS, weight_map

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
    if is_quiet():
        huggingface_hub.utils.disable_progress_bars()
    try:
        # On a terminal the hub's client draws bars of bytes; in a pipe it says nothing.
        is_shown = local or sys.stderr.isatty()
        with nullcontext() if is_shown else working(f"downloading {name} from the hub"):
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
