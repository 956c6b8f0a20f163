"""Convert a model between a Hugging Face folder and an Orbax checkpoint, and compare two of them.

    python tools/convert_weights.py to-jax HF_FOLDER CHECKPOINT
    python tools/convert_weights.py to-hf CHECKPOINT HF_FOLDER
    python tools/convert_weights.py check A B
    python tools/convert_weights.py check A --against-torch

This is `mlmjax convert` for a checkout without installation. Both directions keep every tensor bit
by bit in its dtype on disk. `check` takes either kind on each side, and the checkpoints of a
training run. It prints the largest difference and where it is.
Exit codes: 0 done or identical, 1 different or writing failed, 2 bad input.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlmjax.cli import main
from mlmjax.cli.convert import convert


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code; errors are printed as `mlmjax` prints them."""
    return main.run(arguments, convert, "convert_weights.py")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
