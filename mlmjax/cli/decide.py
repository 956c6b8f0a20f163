"""Define `mlmjax decide` and `mlmjax serve`, which answer typed questions."""

import gc
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from mlmjax.cli.options import Command
from mlmjax.errors import InputError, install_advice

CHUNK = 256
_model = click.option(
    "--model", help="Folder or Hub id of the model (default: the packaged mlmjax-small)."
)
_common = [
    click.option("--revision", help="Revision of a Hub model."),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16"]),
        default="float32",
        show_default=True,
        help="Precision that the model computes in.",
    ),
    click.option(
        "--answer",
        type=click.Choice(["letters", "words"]),
        help="How options are answered (default: that of a saved model, or letters).",
    ),
    click.option(
        "--max-length",
        type=click.IntRange(min=64),
        help="Most tokens of a prompt (default: all that the model reads).",
    ),
    click.option(
        "--anchor",
        metavar="TOKEN",
        help='Token before the mask of a prompt, or "none" (default: that of a saved decider).',
    ),
]


def _with_common(command: Any) -> Any:
    for option in reversed(_common):
        command = option(command)
    return command


@click.command(
    cls=Command,
    examples=["mlmjax decide --model MODEL --questions questions.json states.jsonl"],
)
@_model
@click.option(
    "--questions",
    "questions_file",
    metavar="FILE",
    required=True,
    help="JSON file of questions by their ids, as in the request of a server.",
)
@_with_common
@click.argument("file", default="-")
def decide(model: str | None, questions_file: str, file: str, **options: Any) -> None:
    """Answer typed questions about states.

    FILE, or - for standard input, has a state on each line, as JSON: a text in quotes, an object or
    a list. Each line of output is a JSON object of the answers by their ids.
    """
    gc.set_threshold(50_000, 10, 10)  # imports make many objects, and few of them are garbage
    from mlmjax.cli.tables.inputs import is_read_once
    from mlmjax.decisions.answers import answer_json
    from mlmjax.decisions.decider import Decider
    from mlmjax.decisions.questions import read_questions
    from mlmjax.evaluation.summary import warn_of_shortened
    from mlmjax.parallel.environment import check_devices
    from mlmjax.reporting.terminal import count_progress, say, working
    from mlmjax.scoring.engine import describe_forward_compiling
    from mlmjax.weights.hub import PACKAGED, report_packaged

    questions = read_questions(_read_table(Path(questions_file)))
    total = 0
    if not is_read_once(file):
        for _ in _states(file):  # a bad line raises an error before any answer is printed
            total += 1
    source = PACKAGED if model is None else model
    check_devices()
    with working(f"loading {source}"):
        decider = Decider(source, progress=False, **options)
    report_packaged(model is None)
    states, done = _states(file), 0
    compiling = describe_forward_compiling(decider.model.config.num_hidden_layers)
    with count_progress("states answered", compiling) as progress:
        while chunk := list(itertools.islice(states, CHUNK)):
            for answers in decider.decide_many(chunk, questions):
                shown = {key: answer_json(answer) for key, answer in answers.items()}
                click.echo(json.dumps(shown, ensure_ascii=False))
            done += len(chunk)
            progress(done, total)
    for line in warn_of_shortened(decider):
        say(line)


@click.command(
    cls=Command,
    examples=["mlmjax serve --model MODEL --port 8000 --api-key-env MLMJAX_KEY"],
)
@_model
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen at; 0 takes a free one.",
)
@click.option(
    "--api-key-env", metavar="NAME", help="Environment variable with the key that clients send."
)
@_with_common
@click.option(
    "--max-body",
    type=click.IntRange(min=1024),
    default=8 * 2**20,
    show_default=True,
    help="Most bytes of a request.",
)
@click.option(
    "--max-questions",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Most questions of a request.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=64),
    default=2**17,
    show_default=True,
    help="Most tokens of all prompts of a request.",
)
@click.option(
    "--max-waiting",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Most questions that wait before requests get status 503.",
)
@click.option("--log-texts", is_flag=True, help="Log the body of each request.")
def serve(
    model: str | None,
    host: str,
    port: int,
    api_key_env: str | None,
    max_body: int,
    max_questions: int,
    max_tokens: int,
    max_waiting: int,
    log_texts: bool,
    **options: Any,
) -> None:
    """Answer typed questions over HTTP.

    It needs the extra mlmjax[serve]. The page at / asks questions by hand. On SIGTERM it answers
    what has begun, for at most 30 seconds, and exits with code 0.
    """
    from mlmjax.parallel.environment import check_devices
    from mlmjax.reporting.terminal import say
    from mlmjax.weights.hub import PACKAGED, fetch, report_packaged

    try:
        from mlmjax.serving.app import make_app
        from mlmjax.serving.protocol import Limits
        from mlmjax.serving.serve import serve as run
    except ImportError as error:
        raise InputError(
            f"serve: {error.name or error} is not installed; {install_advice('serve')}"
        ) from error
    key = _key(api_key_env)
    limits = Limits(
        body_bytes=max_body, questions=max_questions, tokens=max_tokens, waiting=max_waiting
    )
    source = PACKAGED if model is None else model
    report_packaged(model is None)
    check_devices()
    fetch(source, revision=options["revision"])  # a wrong name raises an error before the start

    def load() -> Any:
        from mlmjax.decisions.decider import Decider

        return Decider(source, progress=False, **options)

    run(make_app(load, limits=limits, key=key, log_texts=log_texts), host, port, say)


def _key(name: str | None) -> str | None:
    """Return the key that clients must send; raise `InputError` for a missing or blank one."""
    if name is None:
        return None
    key = os.environ.get(name, "")
    if not key or not all("!" <= char <= "~" for char in key):
        raise InputError(
            f"--api-key-env {name}: the variable is not set, or holds other characters than "
            f"printable ASCII without spaces; set {name} to the key that clients send"
        )
    return key


def _read_table(path: Path) -> dict[str, Any]:
    """Return the questions of a file, which may also be the body of a request."""
    from mlmjax.storage import MAX_JSON_BYTES, parse_object, read_bounded, unique_keys

    content = read_bounded(path, MAX_JSON_BYTES)
    advice = "expected questions by their ids"
    found = parse_object(content, str(path), advice, object_pairs_hook=unique_keys)
    inner = found.get("questions")
    return inner if isinstance(inner, dict) and not isinstance(inner.get("type"), str) else found


def _states(file: str) -> Iterator[Any]:
    """Yield the state of each line; raise `InputError` that names a line that is not JSON."""
    from mlmjax.cli.tables.inputs import read_lines
    from mlmjax.storage import unique_keys

    where = "standard input" if file == "-" else file
    for number, line in enumerate(read_lines(file), start=1):
        try:
            yield json.loads(line, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{where} line {number}: is not JSON ({error}); write a state on each line: a "
                "text in quotes, an object or a list"
            ) from error
