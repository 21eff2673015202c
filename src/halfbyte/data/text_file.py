"""Opening a text file: compression, encoding, SHA-256."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from halfbyte.errors import DataError

CHUNK = 1 << 20
# Rows of nothing, and text that says one thing over and over, take next to no room in a file: a
# small one could fill a disk. No data is so alike as that.
MOST_ROWS, ROWS_A_BYTE = 10_000_000, 100
MOST_UNPACKED, TIMES = 1 << 30, 250

# Longest first: the UTF-32 mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def require_likely(path: Path, rows: int) -> None:
    """Raise DataError where a file of its size cannot hold so many ``rows`` that say anything."""
    if rows > max(MOST_ROWS, ROWS_A_BYTE * path.stat().st_size):
        raise DataError(
            f"{path} speaks of {rows:,} rows in {path.stat().st_size:,} bytes, which cannot all "
            "say something; write it again without those that say nothing."
        )


class _Unpacked(io.RawIOBase):
    """What is unpacked of the file ``path``, as far as it is likely."""

    def __init__(self, path: Path, source: BinaryIO) -> None:
        self._path, self._source = path, source
        self._left = max(MOST_UNPACKED, TIMES * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._source.read(len(buffer))
        self._left -= len(found)
        if self._left < 0:
            raise DataError(
                f"{self._path} unpacks to more than {TIMES} times its size and 1 GB, which no data "
                "does; unpack it to look at it, and give what it holds."
            )
        buffer[: len(found)] = found
        return len(found)


def sha256_of(path: Path) -> str:
    """Of the file's bytes as they are, in hexadecimal; other threads go on meanwhile."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The file's content, unpacked where its name ends in .gz or .zst."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        with pyarrow.input_stream(str(path), compression="zstd") as unpacked:
            yield io.BufferedReader(_Unpacked(path, cast(BinaryIO, unpacked)), CHUNK)
        return
    with path.open("rb") as file:
        if suffix == ".gz":
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield io.BufferedReader(_Unpacked(path, cast(BinaryIO, unpacked)), CHUNK)
        else:
            yield file


@contextmanager
def open_text(path: Path, encoding: str, newline: str) -> Iterator[TextIO]:
    """The file as text; line ends come as they are, and ``newline`` says what one is.

    ``""`` is any of \\n, \\r and \\r\\n (what the csv module wants).
    """
    with open_bytes(path) as file, io.TextIOWrapper(file, encoding, newline=newline) as text:
        yield text


def encoding_of(path: Path) -> str | None:
    """By its byte-order mark, else ``utf-8`` where all of the file is that, else None."""
    with open_bytes(path) as file:
        decoder = codecs.getincrementaldecoder("utf-8")()
        chunk = file.read(CHUNK)
        for mark, encoding in _MARKS:
            if chunk.startswith(mark):
                return encoding
        try:
            while chunk:
                decoder.decode(chunk)
                chunk = file.read(CHUNK)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return None
    return "utf-8"
