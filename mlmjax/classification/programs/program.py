"""Export a classifier as compiled programs, their weights, and a script that runs them."""

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export

from mlmjax.classification.predictor import Predictor
from mlmjax.classification.prompter import PROBE, Prompter
from mlmjax.errors import InputError, suggest_keywords
from mlmjax.model.modernbert import abstract_model, merged, parameters, with_parameters
from mlmjax.storage import replace_folder, write_json

RUNNER = "run.py"
SETTINGS, TOKENIZER, WEIGHTS = "program.json", "tokenizer.json", "weights.npz"
FILES = (RUNNER, SETTINGS, TOKENIZER, WEIGHTS, "*.stablehlo", "__pycache__")


@suggest_keywords
def export_program(
    classifier: Predictor,
    path: str | os.PathLike[str],
    *,
    lengths: Sequence[int] = (512,),
    batch_size: int = 8,
) -> None:
    """Write a folder that answers as the classifier does, with jax, numpy and tokenizers alone.

    It holds one program of `batch_size` rows for each of the `lengths` in tokens, and `run.py`,
    which is its example and its interface. A program is for the kind of device that exports it.
    Longer prompts are an error there, so the largest of `lengths` has to fit the longest text.

    Raises `InputError` for a classifier that needs more than one prompt for a text, and for lengths
    or a batch that cannot be; `RunError` if writing fails.
    """
    classifier._load()
    prompter = classifier.asking_
    settings = _describe(classifier, prompter)
    longest = prompter.scorer.max_length
    shortest = settings.pop("shortest")
    if not lengths or not all(shortest < length <= longest for length in lengths):
        raise InputError(
            f"lengths are {list(lengths)}; expected one or more, from {shortest + 1} (the prompt "
            f"around a text) to {longest} tokens"
        )
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected at least 1")
    settings |= {"lengths": sorted(set(lengths)), "batch_size": batch_size}
    model = merged(prompter.scorer.model)
    with replace_folder(Path(path), FILES) as folder:
        for length in settings["lengths"]:
            program = _program(prompter, model, length, batch_size)
            (folder / f"{length}.stablehlo").write_bytes(program)
        with (folder / WEIGHTS).open("wb") as file:
            weights: Any = {name: np.asarray(leaf) for name, leaf in parameters(model).items()}
            np.savez(file, allow_pickle=False, **weights)
        (folder / TOKENIZER).write_text(prompter.scorer.tokenizer.plain_json(), encoding="utf-8")
        write_json(folder / SETTINGS, settings)
        runner = resources.files("mlmjax") / "classification" / "programs" / "runner.py"
        (folder / RUNNER).write_text(runner.read_text(encoding="utf-8"), encoding="utf-8")


def _describe(classifier: Predictor, prompter: Prompter) -> dict[str, Any]:
    """Return what the runner needs to know besides the programs."""
    recipe = prompter.recipe()
    if recipe is None:
        raise InputError(
            "export_program: this classifier needs more than one plain prompt for a text (several "
            "labels per text, few-shot examples, orders, rounds, labels of several tokens at the "
            "slot, or special tokens in its labels); export one that needs one prompt"
        )
    if classifier.settings_.long_text != "shorten":
        raise InputError(
            f"export_program: long_text is {classifier.settings_.long_text!r}; expected 'shorten', "
            "because a program reads one prompt for each text"
        )
    scorer, calibration = prompter.scorer, classifier.settings_.calibration
    tokenizer = scorer.tokenizer
    row = {"options": list(prompter.shown), "examples": "", "text": PROBE}
    prompt = scorer.template.render(tokenizer, row, scorer.max_length).ids
    special = tokenizer.forbidden_ids
    return {
        "labels": list(prompter.names),
        "around": [tokenizer.hide_names(part) for part in recipe[0]],
        "prefix_ids": tokenizer.prefix_ids,
        "suffix_ids": tokenizer.suffix_ids,
        "pad_id": tokenizer.pad_id,
        "slot_id": tokenizer.mask_id if scorer.template.slot else None,
        "special_ids": sorted(special),
        "prompt_special_ids": [i for i in prompt if i in special],
        "bias": None if calibration is None else calibration.bias,
        "temperature": 1.0 if calibration is None else calibration.temperature,
        "platform": jax.default_backend(),
        "shortest": len(prompt) - len(tokenizer.encode_plain(PROBE)),
    }


def _program(prompter: Prompter, model: Any, length: int, batch_size: int) -> bytes:
    """Return the serialized program from weights, ids, segment ids and slots to log probabilities.

    Weights are `{name: array}`, ids and segment ids int32 `[batch, length]`, slots int32 `[batch]`;
    the result is float32 `[batch, labels]`.
    """
    scorer, count = prompter.scorer, len(prompter.names)
    abstract = abstract_model(type(model).__name__, model.config, model.options)
    has_slot = scorer.template.slot

    def score(
        weights: dict[str, jax.Array], ids: jax.Array, segment_ids: jax.Array, slots: jax.Array
    ) -> jax.Array:
        state = nnx.split(with_parameters(abstract, weights))[1]
        columns = (slots, jnp.full(batch_size, count, jnp.int32)) if has_slot else ()
        scored: jax.Array = scorer.engine.jitted(state, ids, segment_ids, *columns)
        return scored[:, :count]

    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in parameters(model).items()
    }
    rows = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
    slots = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    exported = export.export(jax.jit(score))(shapes, rows, rows, slots)
    return bytes(exported.serialize())
