"""Know the files of tests that use what only POSIX has; Windows leaves them out."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
ONLY_THERE = re.compile(
    r"\bimport resource|SIGKILL|send_signal|os\.(fork|umask|mkfifo|kill)\b|\bfork\b|symlink|/dev/|"
    r"\"bash\"|/etc/|chmod|\bpty\b|\bhostile\b"
)


def files_that_need_posix():
    """Return the files of tests whose text names something of POSIX."""
    files = sorted(TESTS.rglob("test_*.py"))
    return [path for path in files if ONLY_THERE.search(path.read_text(encoding="utf-8"))]
