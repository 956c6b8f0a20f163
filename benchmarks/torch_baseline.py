"""Fine-tune a sequence classification model of transformers in torch, as a baseline of a suite.

    python benchmarks/torch_baseline.py FOLDER_OR_ID --suite paper --data DATA --out results/bert
    mlmjax evaluate --suite paper --data DATA --out results/paper --baseline results/bert

The first command writes a folder of results, the second reads them as one more row of its tables.
"""

import inspect
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers

from mlmjax.cli.main import run
from mlmjax.config.run import OptimizerConfig, ScheduleConfig
from mlmjax.config.suite import Sweep, load_suite
from mlmjax.config.tables import decode
from mlmjax.config.task import Task
from mlmjax.errors import InputError, first_line
from mlmjax.evaluation.evaluate import Answers
from mlmjax.evaluation.questions import Question
from mlmjax.evaluation.suite.entrants import (
    DivergedError,
    Entrant,
    Setting,
    hash_files,
    read_texts,
)
from mlmjax.evaluation.suite.suite import run_suite
from mlmjax.reporting.terminal import Progress
from mlmjax.storage import CONFIG, hash_value
from mlmjax.training.optimizer import make_schedule
from mlmjax.weights import hub

_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]


def make_baseline(name: str) -> Entrant:
    """Return the entrant of a folder or hub id; its weights have to be safetensors.

    Raises `InputError` for a folder that is not there or has no such weights.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = hub.packaged_folder(name) or folder
    if not folder.is_dir():
        hub.fetch(name, weights=False)  # raises for what is neither a folder nor a hub id
        folder = hub.download(name, None, False, _FILES)
    if not (folder / CONFIG).is_file() or not list(folder.glob("*.safetensors")):
        raise InputError(
            f"{name}: has no {CONFIG} or no *.safetensors; give the folder of a model saved "
            "by transformers (weights as pickles are not read)"
        )
    files = sorted({path for pattern in _FILES for path in folder.glob(pattern)})
    libraries = [version(library) for library in ("torch", "transformers")]
    return Entrant(
        model=f"transformers:{name}",
        method="transformers",
        key="transformers",
        identity={"model": hash_value([hash_files(files), *libraries])},
        answer=partial(answer_by_transformers, folder),
    )


def answer_by_transformers(
    folder: Path,
    task: Task,
    train: Sequence[Question],
    asked: Sequence[Question],
    setting: Setting,
    sweep: Sweep,
    *,
    seed: int,
    progress: Progress | None = None,
) -> Answers:
    """Fine-tune the model in torch on `train` under one setting, and let it answer `asked`.

    The protocol is that of `answer_fine_tuned`: the same text, optimizer, clipping, schedule and
    order of rows. The tokenizer truncates long texts at their end. No code of the folder is run.
    Raises `DivergedError`, and `InputError` for what transformers cannot load.
    """
    torch.manual_seed(seed)
    model, tokenizer = _load(folder, task)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    longest = min(
        sweep.max_length,
        tokenizer.model_max_length,
        getattr(model.config, "max_position_embeddings", sweep.max_length),
    )
    lengths = [
        len(tokenizer.encode(text, truncation=False, verbose=False))
        for text in read_texts(task, asked)
    ]
    shortened = sum(length > longest for length in lengths)
    updates = setting.epochs * -(-len(train) // sweep.batch_size)
    shape = decode(ScheduleConfig, {"name": "linear", "warmup": sweep.warmup}, "sweep")
    rates = np.asarray(make_schedule(shape, setting.learning_rate, updates)(np.arange(updates)))
    ours = OptimizerConfig()
    optimizer = torch.optim.AdamW(
        _groups(model, sweep.weight_decay), betas=(ours.b1, ours.b2), eps=ours.eps
    )

    # Not every model takes what its tokenizer gives, such as token types.
    known = inspect.signature(model.forward).parameters

    def batch(questions: Sequence[Question]) -> dict[str, Any]:
        fields = tokenizer(
            read_texts(task, questions),
            truncation=True,
            max_length=longest,
            padding=True,
            return_tensors="pt",
        ).to(device)
        return {name: value for name, value in fields.items() if name in known}

    model.train()
    losses, done = [], 0
    for epoch in range(setting.epochs):
        sums = 0.0
        for members in _batches(len(train), sweep.batch_size, [seed, epoch]):
            chosen = [train[i] for i in members]
            gold = torch.tensor([question.gold for question in chosen], device=device)
            loss = torch.nn.functional.cross_entropy(model(**batch(chosen)).logits, gold)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), ours.clip)
            for group in optimizer.param_groups:
                group["lr"] = float(rates[done])
            optimizer.step()
            sums += float(loss.detach()) * len(chosen)
            done += 1
            if progress:
                progress(done, updates)
        if not math.isfinite(sums):
            raise DivergedError(f"the loss of epoch {epoch + 1} is not finite; give a lower rate")
        losses.append(sums / len(train))
    model.eval()
    with torch.no_grad():
        scores = [
            torch.log_softmax(model(**batch(asked[start : start + sweep.batch_size])).logits, -1)
            for start in range(0, len(asked), sweep.batch_size)
        ]
    return Answers(torch.cat(scores).float().cpu().numpy(), shortened, losses)


def _load(folder: Path, task: Task) -> tuple[Any, Any]:
    transformers.logging.set_verbosity_error()  # it warns about the new head every time
    transformers.logging.disable_progress_bar()
    names = dict(enumerate(task.label_names))
    try:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder,
            id2label=names,
            label2id={name: number for number, name in names.items()},
            ignore_mismatched_sizes=True,  # its own head may have other labels
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # a stranger's folder makes transformers raise anything
        raise InputError(
            f"{folder}: transformers cannot load it as a sequence classification model "
            f"({type(error).__name__}: {first_line(error):.200}); give another baseline"
        ) from error
    if tokenizer.pad_token_id is None or model.config.pad_token_id is None:
        raise InputError(
            f"{folder}: its tokenizer or its configuration names no padding token, so that rows "
            "cannot share a batch; set pad_token and pad_token_id, or give another baseline"
        )
    return model, tokenizer


def _groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def _batches(count: int, size: int, seed: list[int]) -> Iterator[np.ndarray]:
    order = np.random.default_rng(seed).permutation(count)
    for start in range(0, count, size):
        yield order[start : start + size]


@click.command()
@click.argument("model", metavar="FOLDER_OR_ID")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--suite", required=True, help="paper, or a suite file (TOML).")
@click.option("--data", default=None, help="Folder of the suite's files.")
@click.option("--out", required=True, help="Folder for the results.")
def main(model: str, overrides: Sequence[str], suite: str, data: str | None, out: str) -> None:
    """Fine-tune a model of transformers on the tasks of a suite."""
    definition, planned = load_suite(suite, overrides)
    run_suite(
        definition,
        [one for one in planned if one.entry.kind == "fine-tune"],
        [],
        out=out,
        data=data,
        others=[make_baseline(model)],
    )


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], main, Path(__file__).name))
