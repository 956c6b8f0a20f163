"""Hold how much the commands print next to their results."""

import logging
from typing import Literal

Verbosity = Literal["quiet", "normal", "verbose"]
"""`quiet` prints results, warnings and errors; `verbose` prints details too."""

WARNING = "warning: "
"""How a line begins that is printed in any case."""

_LOG_LEVELS = {"quiet": logging.WARNING, "normal": logging.INFO, "verbose": logging.DEBUG}
_chosen: Verbosity = "normal"


def set_verbosity(chosen: Verbosity) -> None:
    """Choose how much this process prints on stderr; it sets the level of our loggers too."""
    global _chosen
    _chosen = chosen
    logging.getLogger("mlmjax").setLevel(_LOG_LEVELS[chosen])


def is_quiet() -> bool:
    """Tell whether progress and remarks are left out."""
    return _chosen == "quiet"


def is_verbose() -> bool:
    """Tell whether details are printed."""
    return _chosen == "verbose"


def is_shown(line: str) -> bool:
    """Tell whether a line for stderr is printed: quiet keeps only warnings."""
    return not is_quiet() or line.startswith(WARNING)
