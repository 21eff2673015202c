"""What every reader gives: rows of named cells."""

from __future__ import annotations

from dataclasses import dataclass, field

Cells = dict[str, object]

# Endings of the names of the files that are read.
TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, *(suffix + ".gz" for suffix in TEXT_SUFFIXES), ".parquet")


@dataclass(frozen=True)
class Table:
    """Rows of named cells.

    ``columns`` in the order of the source; a row may lack some of them. ``sha256`` is of a local
    file's bytes; ``warnings`` tell what had to be guessed while reading.
    """

    columns: list[str]
    rows: list[Cells]
    sha256: str | None = None
    warnings: list[str] = field(default_factory=list)
