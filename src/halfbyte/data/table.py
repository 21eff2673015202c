"""What every reader gives: rows of named cells."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field

from halfbyte.data.spool import Spool

Cells = dict[str, object]

# Endings of the names of the files that are read.
TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
PACKED = (".gz", ".zst")
ARROW_SUFFIXES = (".arrow", ".feather")
SUFFIXES = (
    *TEXT_SUFFIXES,
    *(suffix + packed for suffix in TEXT_SUFFIXES for packed in PACKED),
    ".parquet",
    *ARROW_SUFFIXES,
)


class CellStore(Spool[Cells]):
    """Rows in the order in which they are read."""

    @staticmethod
    def encode(cells: Cells) -> bytes:
        return pickle.dumps(cells, protocol=5)

    @staticmethod
    def decode(stored: bytes) -> Cells:
        cells: Cells = pickle.loads(stored)  # of this process's own file
        return cells


@dataclass(frozen=True)
class Table:
    """Rows of named cells.

    ``columns`` in the order of the source; a row may lack some of them. ``sha256`` is of a local
    file's bytes, and of several files of their digests, one a line; ``warnings`` tell what had to
    be guessed while reading. ``files`` are those that the rows are from, each with the number of
    its first row, where there are several. With ``typed`` all cells of a column have one type, so
    that an object holds None under the keys that only other rows' objects have.
    """

    columns: list[str]
    rows: Sequence[Cells]
    sha256: str | None = None
    warnings: list[str] = field(default_factory=list)
    files: list[tuple[int, str]] = field(default_factory=list)
    typed: bool = False
