"""CSV files as spreadsheets write them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from halfbyte.data.table import CellStore, Table
from halfbyte.data.text_file import encoding_of, open_text, sha256_of
from halfbyte.errors import DataError

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}

# What is looked at to find the delimiter.
SNIFFED_CHARACTERS = 1 << 16
SNIFFED_RECORDS = 50

# The csv module takes 131,072 characters a cell unless told otherwise.
LONGEST_CELL = 1 << 30


def read_csv(path: Path, limit: int | None, *, delimiter: str | None = None) -> Table:
    """Rows under a header line; all cells are text.

    The delimiter is looked for among comma, semicolon, tab and bar unless given. The encoding
    follows from a byte-order mark, else it is UTF-8, or, where the file is not that,
    Windows-1252, which a warning tells. Columns without a name (an index that a program wrote,
    a spreadsheet's empty margin) are left out. Raises DataError, naming the line, for a row whose
    number of cells is not the header's.
    """
    encoding = encoding_of(path)
    warnings = []
    if encoding is None:
        encoding = "cp1252"
        warnings.append(
            f"{path} is not UTF-8 and was read as Windows-1252; look at a row with accents, and "
            "save the file as UTF-8 where they are wrong."
        )
    with _long_cells(), open_text(path, encoding, "") as file:
        try:
            start = file.read(SNIFFED_CHARACTERS)
            first_line, _, rest = start.partition("\n")
            told = _told_delimiter(first_line)
            if told is not None:
                start = rest
            delimiter = delimiter or told or find_delimiter(start)
            lines = _lines(start, file)
            rows, columns = _read(path, lines, delimiter, limit, 1 if told is None else 2)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not all {encoding} (byte {error.start:,}); save the file as UTF-8."
            ) from error
    return Table(columns, rows, sha256_of(path), warnings)


def find_delimiter(start: str) -> str:
    """The delimiter under which the records of ``start`` have most often as many cells as the
    first; of several, the one that makes most cells."""

    def fit(delimiter: str) -> tuple[float, int]:
        reader = csv.reader(io.StringIO(start, newline=""), delimiter=delimiter)
        try:
            sizes = [len(cells) for cells in islice(reader, SNIFFED_RECORDS + 1) if cells]
        except csv.Error:
            return 0.0, 0
        if len(start) >= SNIFFED_CHARACTERS and 1 < len(sizes) <= SNIFFED_RECORDS:
            sizes.pop()  # it may be cut
        if not sizes or sizes[0] == 1:
            return 0.0, 0
        return sum(size == sizes[0] for size in sizes) / len(sizes), sizes[0]

    return max(DELIMITERS, key=fit)


def _read(
    path: Path, lines: Iterator[str], delimiter: str, limit: int | None, first_line: int
) -> tuple[CellStore, list[str]]:
    # Strict: a quotation mark that is never closed would otherwise take the rest of the file for
    # one cell.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    rows = CellStore()
    header: list[str] | None = None
    line = first_line
    try:
        for cells in reader:
            at, line = line, first_line + reader.line_num
            if not any(cells):
                continue  # a line of nothing, or of delimiters alone
            if header is None:
                header = _header(path, cells)
                continue
            while len(cells) > len(header) and not cells[-1]:
                cells.pop()
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, line {at}: {_count(len(cells))} where the header has {len(header)} "
                    f"(cells are divided by a {DELIMITERS[delimiter]}); put a cell that holds "
                    "one, or a line break, in quotation marks."
                )
            rows.append({n: c for n, c in zip(header, cells, strict=True) if n})
            if len(rows) == limit:
                break
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line}: this is not CSV ({error}); a cell with quotation marks in it "
            "is put in quotation marks and its own are doubled."
        ) from error
    return rows, [name for name in header or [] if name]


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: two columns are called {twice}; rename one of them.")
    while names and not names[-1]:
        names.pop()
    return names


def _told_delimiter(line: str) -> str | None:
    """The delimiter in a first line ``sep=;``, which spreadsheets take as a hint."""
    line = line.rstrip("\r")
    if len(line) == 5 and line.lower().startswith("sep=") and line[4] in DELIMITERS:
        return line[4]
    return None


def _lines(start: str, file: io.TextIOBase | Iterator[str]) -> Iterator[str]:
    """The lines of what was read already and of what was not."""
    lines = list(io.StringIO(start, newline=""))
    following = iter(file)
    yield from lines[:-1]
    if lines:
        last, rest = lines[-1], "" if lines[-1].endswith("\n") else next(following, "")
        if last.endswith("\r") and rest != "\n":
            yield from (last, rest)
        else:
            yield last + rest
    yield from following


def _count(cells: int) -> str:
    return f"{cells} cell{'' if cells == 1 else 's'}"


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)
