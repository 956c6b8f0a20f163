"""Read the lines of text files in any encoding, which the first bytes or the user name."""

import codecs
import io
import logging
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from mlmjax.errors import InputError

MAX_LINE_BYTES = 32 * 2**20
"""A longer line (or CSV field) is an error, so that one hostile line cannot fill memory."""

READ_AHEAD = 2**14
"""Bytes that may be lost before the place where a compressed file is damaged."""

Note = Callable[[str], None]
"""Gets what was found out about a file, for the user."""

Reject = Callable[[InputError], None]
"""Gets the error of a line, and raises it, or returns to read on."""

ENCODING_ADVICE = (
    'say how it is encoded, as in encoding = "latin-1" (--encoding latin-1), or convert it to UTF-8'
)
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


_BINARY = {
    b"\x1f\x8b": "compressed by gzip; expected a name that ends in .gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; expected a name that ends in .zst",
    b"PAR1\x15": "a parquet file; expected a name that ends in .parquet",
    b"PK\x03\x04": "a zip file, as spreadsheets are; save it as CSV",
}
"""First bytes of files that hold no text, and what to do with them."""


def note_once(log: logging.Logger, noted: set[str]) -> Note:
    """Return a function that logs what is not in `noted` yet."""

    def note(text: str) -> None:
        if text not in noted:
            noted.add(text)
            log.warning("%s", text)

    return note


def open_as_utf8(
    stream: io.BufferedReader, where: str, encoding: str | None, note: Note
) -> io.BufferedReader:
    """Return the bytes of a text file in UTF-8.

    Without `encoding` a file is UTF-8, or UTF-16 or UTF-32 if it begins with their byte order mark,
    which is noted. Reading raises `InputError` with the place of a byte that cannot be decoded.
    """
    if encoding is None:
        start = _peek(stream, where)
        encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
        if encoding is not None:
            note(
                f"{where}: read as {encoding.upper()}, which its first bytes name; encoding sets "
                "another encoding"
            )
    if encoding is None or codecs.lookup(encoding).name in ("utf-8", "utf-8-sig"):
        return stream
    return io.BufferedReader(_Transcoded(stream, encoding, where), READ_AHEAD)


class _Transcoded(io.RawIOBase):
    """A file that is decoded from one encoding, and read in UTF-8."""

    def __init__(self, stream: io.BufferedReader, encoding: str, where: str):
        self._stream, self._encoding, self._where = stream, encoding, where
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._read, self._rest = 0, b""

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; return the number of bytes, 0 at the end."""
        while not self._rest:
            part = self._stream.read1(READ_AHEAD)
            self._rest = self._decode(part)
            if not part:
                break
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)], self._rest = taken, self._rest[len(taken) :]
        return len(taken)

    def _decode(self, part: bytes) -> bytes:
        kept = self._decoder.getstate()[0]
        try:
            text = self._decoder.decode(part, final=not part).encode()
        except UnicodeError as error:
            at = self._read - len(kept) + getattr(error, "start", 0)
            raise InputError(
                f"{self._where}: byte {at + 1:,} of the file is not {self._encoding.upper()} text; "
                "set encoding to the encoding of the file (--encoding), or convert it to UTF-8"
            ) from error
        self._read += len(part)
        return text


def number_lines(
    stream: io.BufferedReader, where: str, note: Note, reject: Reject, *, nul: bool = False
) -> Iterator[tuple[int, str]]:
    """Yield numbered lines of UTF-8, from 1, without a byte order mark at the start.

    Lines end in a line feed, or (in files of old Macs) in a carriage return; this is noted. `where`
    is the file in messages, after which the number follows. `nul` allows the character NUL.
    """
    start = _peek(stream, where)
    for mark, problem in _BINARY.items():
        if start.startswith(mark):
            raise InputError(f"{where}: by its first bytes it is {problem}")
    is_old = b"\r" in start[:-1] and b"\n" not in start
    if is_old:
        note(f"{where}: lines end in a carriage return, as on old Macs")
    readline = _OldLines(stream).readline if is_old else stream.readline

    def read(limit: int, here: str) -> bytes:
        try:
            return readline(limit)
        except OSError as error:
            error.add_note(here)
            raise

    for number in count(1):
        here = f"{where} line {number}"
        line = read(MAX_LINE_BYTES + 1, here)
        if not line:
            return
        is_long = len(line) > MAX_LINE_BYTES
        if is_long:
            problem = f"is longer than {MAX_LINE_BYTES >> 20} MiB; expected one record per line"
        elif b"\0" in line and not nul:
            wide = "utf-16-be" if line.startswith(b"\0") else "utf-16-le"
            problem = "holds a NUL byte; expected text (is it binary?) in UTF-8; if it is UTF-16, "
            problem += f'set encoding = "{wide}" (--encoding {wide})'
        else:
            try:
                text = line.decode()
                # Files that were joined or converted twice have several marks.
                yield number, text.lstrip("\ufeff") if number == 1 else text
                continue
            except UnicodeDecodeError as error:
                problem = (
                    f"is not UTF-8 (byte {error.start + 1} of the line is "
                    f"0x{line[error.start]:02x}); {ENCODING_ADVICE}"
                )
        reject(InputError(f"{here}: {problem}"))
        while is_long and line and not line.endswith((b"\n", b"\r")):
            line = read(MAX_LINE_BYTES, here)


def _peek(stream: io.BufferedReader, where: str) -> bytes:
    try:
        return stream.peek(READ_AHEAD)
    except OSError as error:
        error.add_note(f"{where} line 1")
        raise


class _OldLines:
    """Read lines that end in a carriage return."""

    def __init__(self, stream: io.BufferedReader):
        self._stream, self._rest = stream, b""

    def readline(self, limit: int) -> bytes:
        """Return the next line, or `limit` bytes of it; empty at the end of the file."""
        parts = [self._rest]
        size = len(self._rest)
        while b"\r" not in parts[-1] and size < limit:
            part = self._stream.read1(READ_AHEAD)
            if not part:
                break
            parts.append(part)
            size += len(part)
        text = b"".join(parts)
        end = min(text.find(b"\r") + 1 or len(text), limit)
        line, self._rest = text[:end], text[end:]
        return line
