"""Define what commands share: options, how much they print, and examples in the help."""

import math
import platform
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from mlmjax._version import __version__
from mlmjax.parallel.environment import check_flags
from mlmjax.reporting.verbosity import is_verbose, set_verbosity

if TYPE_CHECKING:
    from mlmjax.config.data import CsvOptions


_WORDS = "mlmjax.words"


class Talk:
    """Hold what the options of one call say about its output."""

    def __init__(self) -> None:
        self.debug = False
        self.chosen: str | None = None
        self.started = time.perf_counter()
        set_verbosity("normal")

    def choose(self, name: str) -> None:
        """Take an option that is given; raise `UsageError` for both of --quiet and --verbose."""
        if name == "debug":
            self.debug = True
        elif self.chosen not in (None, name):
            raise click.UsageError("--quiet and --verbose exclude each other; give one of them.")
        elif self.chosen is None:
            self.chosen = name
            set_verbosity("quiet" if name == "quiet" else "verbose")
            if is_verbose():
                self.say(f"mlmjax {__version__}, Python {platform.python_version()}")

    def finish(self) -> None:
        """Print what the call took, if it is verbose."""
        if not is_verbose():
            return
        text = f"took {time.perf_counter() - self.started:.1f} s"
        if sys.platform == "linux":  # where the unit is a KiB
            import resource  # Windows has none

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            text += f" and at most {peak / 2**20:.1f} GiB of memory"
        self.say(text)

    def say(self, text: str) -> None:
        """Print a line on stderr."""
        click.echo(text, err=True)


def _choose(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and parameter.name:
        context.ensure_object(Talk).choose(parameter.name)


def _shared_options() -> list[click.Parameter]:
    """Return the options of every command; eager, so that they hold for errors in the others."""
    shared: dict[str, Any] = {
        "is_flag": True,
        "expose_value": False,
        "is_eager": True,
        "callback": _choose,
    }
    return [
        click.Option(["-q", "--quiet"], help="Print only results, warnings and errors.", **shared),
        click.Option(["-v", "--verbose"], help="Print more detail.", **shared),
        click.Option(["--debug"], help="Show the traceback of an error.", **shared),
    ]


class FiniteRange(click.FloatRange):
    """A number within bounds; unlike click's, it is finite, and NaN is within no bounds."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number; fail for one that is not finite."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


class LearningRate(FiniteRange):
    """A number above 0, or "auto"."""

    name = "number or auto"

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number or "auto"; fail for anything else."""
        return value if value == "auto" else super().convert(value, param, ctx)


def given_words(context: click.Context) -> tuple[str, ...]:
    """Return the words after the name of a command, as they were given."""
    words: tuple[str, ...] = context.meta[_WORDS]
    return words


class _Shared(click.Command):
    """A command with the shared options, `-h`, and examples at the end of its help."""

    def __init__(self, *parts: Any, examples: Sequence[str] = (), **options: Any):
        settings = {"help_option_names": ["-h", "--help"]}
        options["context_settings"] = settings | (options.get("context_settings") or {})
        self.examples = tuple(examples)
        if examples:
            title = "Example:" if len(examples) == 1 else "Examples:"
            options["epilog"] = "\n".join(["\b", title, *(f"  {line}" for line in examples)])
        super().__init__(*parts, **options)
        self.params = [*self.params, *_shared_options()]
        click.version_option(__version__, "-V", "--version", prog_name="mlmjax")(self)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the words for `given_words`, and parse them."""
        ctx.meta[_WORDS] = tuple(args)
        return super().parse_args(ctx, args)


class Command(_Shared):
    """A command of `mlmjax`, which starts only if XLA takes its flags."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; raise `InputError` for `XLA_FLAGS` that XLA rejects."""
        check_flags()
        return super().invoke(ctx)


class Group(_Shared, click.Group):
    """A group of commands of `mlmjax`."""

    command_class = Command


# Options that several commands share.
revision = click.option("--revision", help="Revision of a Hub model.")
dtype = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Precision that the model computes in.",
)
anchor = click.option(
    "--anchor",
    metavar="TOKEN",
    help='Token before the mask of a prompt, or "none" (default: the tokenizer\'s own).',
)
batch_size = click.option(
    "--batch-size", type=click.IntRange(min=1), help="Rows of one forward pass."
)


def _check_encoding(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    """Return the name of an encoding; raise `BadParameter` for an unknown one."""
    from mlmjax.config.data import check_encoding

    try:
        return None if value is None else check_encoding(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from error


encoding = click.option(
    "--encoding",
    metavar="NAME",
    callback=_check_encoding,
    help="Encoding of the texts, such as latin-1 (default: UTF-8, or by the first bytes).",
)


def _read_csv_options(
    context: click.Context, parameter: click.Parameter, value: tuple[str, ...]
) -> "CsvOptions":
    from mlmjax.config.data import CsvOptions

    return CsvOptions.parse(value)


csv = click.option(
    "--csv",
    multiple=True,
    metavar="KEY=VALUE",
    callback=_read_csv_options,
    help="How a CSV file is written: separator, quote, escape or merged_lines (default: detected).",
)
max_length = click.option(
    "--max-length",
    type=click.IntRange(min=1),
    help="Most tokens of prompt and text together; longer texts are truncated (default: what the "
    "model reads).",
)
