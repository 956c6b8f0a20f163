"""Start `mlmjax`: environment, compile cache, and errors turned into exit codes."""

import _thread
import atexit
import codecs
import gc
import io
import json
import logging
import os
import platform
import signal
import sys
import threading
import traceback
import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import click

from mlmjax.cli.commands import cli
from mlmjax.cli.options import Talk
from mlmjax.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    InputError,
    RunError,
    first_details,
    write_advice,
)
from mlmjax.parallel.environment import explain_environment, set_flags


def keep_compiled() -> None:
    """Let JAX cache compiled programs in `~/.cache/mlmjax/xla`.

    `JAX_COMPILATION_CACHE_DIR` names another folder, `JAX_ENABLE_COMPILATION_CACHE=false` turns the
    cache off. A folder that cannot be written is not used.
    """
    enabled = os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "true").lower()
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or enabled in ("false", "0", "no", "off"):
        return
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(base, "mlmjax", "xla", _processor())
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK | os.X_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder


def _processor() -> str:
    """Return a name for the features of this processor, which programs depend on."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            features = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    return f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"


_ESCAPE = "mlmjax.escape"


def escape_unprintable(error: UnicodeError) -> tuple[str, int]:
    r"""Replace characters that a stream cannot encode as JSON does, as in `\u00e9`."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error(_ESCAPE, escape_unprintable)


def start_in_utf8() -> None:
    """Start this program again in UTF-8 mode where the locale knows only ASCII, as `LC_ALL=C` may.

    Otherwise no path, label or text outside ASCII could be named.
    """
    if "ascii" not in sys.getfilesystemencoding() or "utf8" in sys._xoptions or not sys.executable:
        return
    os.environ["PYTHONUTF8"] = "1"  # for the processes that we start
    with suppress(OSError):
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


class WarnOnce(logging.Filter):
    """Drop a warning that repeats an earlier one, such as one about a file that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether to print a record."""
        if record.levelno < logging.WARNING:
            return True
        text = record.getMessage()
        is_new = text not in self._seen
        self._seen.add(text)
        return is_new


def replace_closed_streams() -> None:
    """Let a standard stream that was closed lead nowhere.

    Otherwise the next file that is opened gets its number, and what libraries write to stderr; and
    `print` takes stdout where there is no stderr.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def format_warning(
    message: Warning | str, category: type, filename: str, lineno: int, line: str | None = None
) -> str:
    r"""Return a warning of Python as one line, without the line of code that gave it.

    >>> format_warning("the text\nis long", UserWarning, "engine.py", 7)
    'warning: the text is long\n'
    """
    return f"warning: {' '.join(str(message).split())}\n"


def set_up_output() -> None:
    """Let the streams take any text, and the log be plain lines on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if "ascii" in stream.encoding:  # PYTHONIOENCODING may say so; click does the same
            stream.reconfigure(encoding="utf-8", errors=_ESCAPE)
        elif stream.errors == "strict":
            stream.reconfigure(errors=_ESCAPE)
    # A failed save leaves unfinished writes, each with a traceback; we print the error once.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    if logging.lastResort:
        # Orbax would otherwise give the root logger a handler that prefixes every line. Hugging
        # Face has its own handler and would print every line twice.
        logging.lastResort.setLevel(logging.DEBUG)  # loggers say what is shown
        logging.lastResort.filters = [WarnOnce()]
        logging.basicConfig(format="%(message)s", handlers=[logging.lastResort])
        logging.getLogger("huggingface_hub").propagate = False


def run(arguments: Sequence[str], command: click.Command = cli, program: str = "mlmjax") -> int:
    """Run one command and return its exit code; messages go to stderr."""
    talk = Talk()
    set_up_output()
    set_flags()
    keep_compiled()
    # The cache may be full or gone; the program is then compiled again.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")

    def fail(message: str, details: Sequence[str], code: int) -> int:
        if talk.debug:
            traceback.print_exc()
        first, *rest = [*message.splitlines(), *details] or [""]
        lines = [f"{program}: {first}", *(f"  {line}" for line in first_details(rest))]
        click.echo("\n".join(lines), err=True)
        return code

    # Recorders of warnings and `-W error` do without this function, so that they work as ever.
    usual, warnings.formatwarning = warnings.formatwarning, format_warning
    try:
        result = command.main(list(arguments), prog_name=program, standalone_mode=False, obj=talk)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return EXIT_BAD_INPUT
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else program
        return fail(f"{error.format_message()} See '{path} --help'.", (), EXIT_BAD_INPUT)
    except InputError as error:
        return fail(error.message, error.details, EXIT_BAD_INPUT)
    except RunError as error:
        return fail(str(error), (), EXIT_FAILED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except OSError as error:
        return fail(f"{error}; {write_advice(error)}", (), EXIT_FAILED)
    except Exception as error:
        if (reason := explain_environment(error)) is not None:
            return fail(reason.message, reason.details, EXIT_BAD_INPUT)
        message = f"internal error: {type(error).__name__}: {error}".splitlines()[0]
        return fail(f"{message}; --debug shows where", (), EXIT_FAILED)
    finally:
        warnings.formatwarning = usual
        talk.finish()
    return result if isinstance(result, int) else 0


# What handlers of signals raise.
_SIGNAL_OF = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}


def listen_to_interrupts() -> None:
    """Let Ctrl-C end the process at any moment of a command.

    Python loses an exception that a signal raises within a callback of its garbage collector, and
    JAX has one; the signal is then sent again. In an import an extension module may turn the
    exception into another one, or abort; the process then ends at once.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # the shell may ignore it for jobs in the background
    report, thread = sys.unraisablehook, threading.get_ident()

    def handle(number: int, frame: FrameType | None) -> None:
        files = (found.f_code.co_filename for found, _ in traceback.walk_stack(frame))
        if any("importlib._bootstrap" in file for file in files):
            os.write(2, b"\n")
            os._exit(EXIT_INTERRUPTED)
        raise KeyboardInterrupt

    def send_again(found: Any) -> None:
        number = _SIGNAL_OF.get(found.exc_type)
        if callable(number and signal.getsignal(number)):
            # Windows has no pthread_kill; the other does not end a wait.
            has_kill = hasattr(signal, "pthread_kill")
            send = partial(signal.pthread_kill, thread) if has_kill else _thread.interrupt_main
            threading.Timer(0.05, send, (number,)).start()
        else:
            report(found)

    signal.signal(signal.SIGINT, handle)
    sys.unraisablehook = send_again


def main() -> None:
    """Entry point of the `mlmjax` command."""
    start_in_utf8()
    replace_closed_streams()
    listen_to_interrupts()
    # Imported modules and compiled programs live to the end; a last search of them for cycles takes
    # a sixth of a short command's time.
    atexit.register(gc.freeze)
    try:
        code = run(sys.argv[1:])
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else EXIT_FAILED
    if "mlmjax.parallel.failures" not in sys.modules:
        sys.exit(code)
    from mlmjax.parallel.failures import leave

    leave(code)
