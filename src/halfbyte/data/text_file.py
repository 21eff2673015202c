"""Opening a text file: compression, encoding, SHA-256."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO, cast

CHUNK = 1 << 20

# Longest first: the UTF-32 mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def sha256_of(path: Path) -> str:
    """Of the file's bytes as they are."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The file's content, unpacked where its name ends in .gz or .zst."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        with pyarrow.input_stream(str(path), compression="zstd") as unpacked:
            yield cast(BinaryIO, io.BufferedReader(unpacked))
        return
    with path.open("rb") as file:
        if suffix == ".gz":
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield cast(BinaryIO, unpacked)
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
