"""Write model cards, and carry along what says where weights come from."""

import logging
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np

from mlmjax.errors import InputError
from mlmjax.model.architecture import Provenance
from mlmjax.model.modernbert import ADAPTER_WEIGHTS, Model, parameters
from mlmjax.storage import CARD, MAX_JSON_BYTES, PROVENANCE, TRAINING, plain_file, read_bounded

log = logging.getLogger(__name__)

_KEPT = ("license", "license_name", "license_link", "language", "base_model", "datasets")
"""What the metadata of a derived model takes from the card of its source."""

SOURCE_HEADING = "\n## Source of the weights\n"
_RESULTS = re.compile(r"^## Measured results\n.*?(?=^## |\Z)", flags=re.MULTILINE | re.DOTALL)

_KINDS = {
    "ModernBertForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
    "ModernBertForSequenceClassification": (
        "text-classification",
        "AutoModelForSequenceClassification",
    ),
    "ModernBertModel": ("feature-extraction", "AutoModel"),
}
"""The task of each class on the hub, and the class that loads it."""


def read_provenance(folder: Path) -> dict[str, bytes]:
    """Return the files of a model folder that say where its weights come from, by their names.

    A file that cannot be read is left out with a warning, because the weights do not need it.
    """
    files = {}
    for name in PROVENANCE:
        if os.path.lexists(folder / name):
            try:
                files[name] = read_bounded(plain_file(folder, name), MAX_JSON_BYTES)
            except InputError as error:
                log.warning("%s (saved models will lack this file)", error.message)
    return files


def with_provenance(model: Model, files: Mapping[str, bytes]) -> Model:
    """Let a model that was just read know where its weights come from; return the model."""
    model.config = replace(
        model.config, provenance=Provenance(files, fingerprint(model), _kind(model))
    )
    return model


def with_adapter_provenance(model: Model, own: Mapping[str, bytes]) -> Model:
    """Let a base to which an adapter was attached know the adapter's files too; return the model.

    `own` are those of `read_provenance` of the adapter's folder. What the adapter lacks is that of
    the base; a training manifest then gets a run of which nothing is known.
    """
    base = model.config.provenance
    files, text = {**base.files, **own}, base.files.get(CARD, b"").decode(errors="replace")
    if CARD in own and text not in own[CARD].decode(errors="replace"):
        files[CARD] = own[CARD] + _source_section(base).encode()
    if TRAINING in base.files and TRAINING not in own:
        files[TRAINING] = _with_unknown_run(base.files[TRAINING], "an adapter without a manifest")
    # The card of a base is not that of its adapter.
    kind = _kind(model) if CARD in own else None
    found = Provenance(files, fingerprint(model), kind, base.origin)
    model.config = replace(model.config, provenance=found)
    return model


def fingerprint(model: Model) -> int:
    """Return a hash of the norms and biases of the encoder and the head, and of adapters.

    They are few. Any training of a whole model or of an adapter changes them, and most trainings of
    chosen parameters.
    """
    found, ends = 0, ("norm.weight", ".bias", *ADAPTER_WEIGHTS)
    for name, value in sorted(parameters(model).items()):
        if name.startswith(("model.", "head.")) and name.endswith(ends):
            found = zlib.crc32(np.asarray(value, np.float32).tobytes(), found)
    return found


def files_to_keep(
    model: Model, anchor: str | None = None, *, written: Model | None = None
) -> dict[str, bytes]:
    """Return what an export of a model says about where its weights come from, by file name.

    `anchor` is the token before the mask that a new card names. `written` is the model in the form
    that is written, if its adapter is added to its weights.

    The card of the source is kept if this is the same model. It becomes a section of a new card if
    the vocabulary, the head or the weights are others. Weights that were trained without a record
    add a run to the training manifest, of which nothing is known.
    """
    source = model.config.provenance
    files = dict(source.files)
    is_trained = source.norms is not None and source.norms != fingerprint(model)
    written = model if written is None else written
    if CARD not in files or is_trained or source.kind != _kind(model) or written is not model:
        files[CARD] = _new_card(written, anchor).encode()
    if TRAINING in files and is_trained:
        unknown = "a training that mlmjax did not record"
        files[TRAINING] = _with_unknown_run(files[TRAINING], unknown)
    return files


def _new_card(model: Model, anchor: str | None) -> str:
    """Return the card of a model, or of its adapter if it is written as one."""
    origin = model.config.provenance.origin
    if model.config.adapter is None or origin is None:
        return model_card(model, anchor=anchor)
    return model_card(model, template="adapter_card.md", library="peft", base=origin.name)


def _with_unknown_run(manifest: bytes, source: str) -> bytes:
    try:
        return add_run(manifest, source)
    except InputError as error:  # weights that were trained are saved whatever the file holds
        log.warning("%s; it is saved unchanged, without this training", error.message)
        return manifest


def _kind(model: Model) -> tuple[str, int]:
    return type(model).__name__, model.config.vocab_size


def add_run(manifest: bytes, source: str, start: object = None) -> bytes:
    """Add a run of unknown data to a training manifest, and name it; raises `InputError`.

    `start` is the model that it began with, if it has a name.
    """
    from mlmjax.data.contamination import add_unknown_run  # here, because it loads pydantic tables

    name = os.fspath(start) if isinstance(start, str | os.PathLike) else None
    return add_unknown_run(manifest, source, name)


def model_card(
    model: Model,
    *,
    template: str = "model_card.md",
    library: str = "transformers",
    pipeline: str | None = None,
    sections: str = "",
    results: "Sequence[huggingface_hub.EvalResult]" = (),
    **values: Any,
) -> str:
    """Return the text of README.md: metadata for the hub, what the model is, how to load it.

    `template` is a file of `assets` and `values` are what it needs besides the figures of the
    model. `sections` is Markdown that follows. `results` are evaluation results for the metadata,
    as are `library` and `pipeline` (by default that of the model's class).
    """
    from mlmjax.reporting import pages  # here, because loading a model needs no templates

    name = type(model).__name__
    usual, auto = _KINDS[name]
    data = huggingface_hub.ModelCardData(
        library_name=library,
        pipeline_tag=pipeline or usual,
        tags=["modernbert", "mlmjax"],
        model_name=name if results else None,
        eval_results=list(results) or None,
        **_inherited(model.config.provenance),
    )
    body = pages.render(
        f"assets/{template}",
        metadata=data.to_yaml(),
        name=name,
        auto=auto,
        config=model.config,
        parameters=sum(leaf.size for leaf in parameters(model).values()),
        **{"anchor": None, **values},
    )
    source = _source_section(model.config.provenance)
    return str(huggingface_hub.ModelCard(body + sections + source))


def measured(
    figures: Mapping[str, Any], test: str, *, contamination: str = "held out"
) -> "list[huggingface_hub.EvalResult]":
    """Return the accuracy and macro-F1 of `figures` as results for the hub, with n and interval.

    `test` names the rows. `contamination` says whether they were seen in training.

    >>> [one] = measured({"n": 4, "accuracy": 0.5, "accuracy_ci95": [0.15, 0.85]}, "my test")
    >>> one.dataset_type, one.metric_value, one.metric_args["interval_95"]
    ('my-test', 0.5, [0.15, 0.85])
    """
    return [
        huggingface_hub.EvalResult(
            task_type="text-classification",
            dataset_type=re.sub(r"\W+", "-", test).strip("-") or "test",
            dataset_name=test,
            metric_type=metric,
            metric_name=name,
            metric_value=figures[metric],
            metric_args={
                "n": figures["n"],
                "interval_95": list(figures[f"{metric}_ci95"]),
                "contamination": contamination,
            },
        )
        for metric, name in (("accuracy", "accuracy"), ("macro_f1", "macro-F1"))
        if figures.get(f"{metric}_ci95") is not None
    ]


def with_results(
    text: str, results: "Sequence[huggingface_hub.EvalResult]", model_name: str = "this model"
) -> str:
    """Return a card with measured results, in its metadata and as a table.

    A result replaces an older one of the same test and metric; others stay.
    """
    if not results:
        return text
    from mlmjax.reporting import pages

    card = huggingface_hub.ModelCard(text, ignore_metadata_errors=True)
    data: Any = card.data
    tests = {(one.dataset_name, one.metric_type) for one in results}
    before = data.eval_results or []
    kept = [one for one in before if (one.dataset_name, one.metric_type) not in tests]
    data.eval_results = [*kept, *results]
    data.model_name = data.model_name or model_name
    # A quoted card may have results, too.
    body, source, rest = card.text.partition(SOURCE_HEADING)
    body = _RESULTS.sub("", body).rstrip()
    table = pages.render("assets/results_card.md", results=data.eval_results)
    return f"---\n{data.to_yaml()}\n---\n{body}\n\n{table}{source}{rest}"


def _inherited(source: Provenance) -> dict[str, Any]:
    """Return the metadata that a derived model takes from its source and the card of it."""
    origin = source.origin
    is_hub = origin is not None and origin.revision is not None
    own = {"base_model": origin.name} if origin is not None and is_hub else {}
    return {**_metadata_of_source(source), **own}


def _metadata_of_source(source: Provenance) -> dict[str, Any]:
    from huggingface_hub.repocard import REGEX_YAML_BLOCK  # here, because loading needs no cards

    text = source.files.get(CARD, b"").decode(errors="replace")
    if REGEX_YAML_BLOCK.search(text) is None:
        return {}
    try:
        found = huggingface_hub.ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a stranger's metadata may be of any form
        log.warning("the metadata of the source's %s cannot be read; see its text below", CARD)
        return {}
    return {key: found[key] for key in _KEPT if found.get(key) is not None}


def _source_section(source: Provenance) -> str:
    """Return a section with the whole card of the source, in a block that it cannot end."""
    from mlmjax.reporting.markdown import fenced

    if CARD not in source.files:
        return ""
    text = source.files[CARD].decode(errors="replace")
    return f"{SOURCE_HEADING}\nTheir card:\n\n{fenced(text)}\n"
