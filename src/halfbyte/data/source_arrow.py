"""Arrow files: the stream and the file of its IPC format; the latter is also called Feather."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfbyte.data.table import CellStore, Table
from halfbyte.data.text_file import require_likely, sha256_of
from halfbyte.errors import DataError

ROWS_AT_ONCE = 4096
# What pyarrow raises for files that are damaged, beside its own exceptions.
UNREADABLE = (ValueError, OverflowError, MemoryError, KeyError, TypeError, NotImplementedError)


def reason(error: BaseException) -> str:
    """The first line of what pyarrow says."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def read_arrow(path: Path, limit: int | None) -> Table:
    """The first ``limit`` rows; batches behind them are not read."""
    rows = CellStore()
    columns = add_arrow_rows(path, rows, limit)
    return Table(columns, rows, sha256_of(path), typed=True)


def add_arrow_rows(path: Path, rows: CellStore, limit: int | None) -> list[str]:
    """Append the file's rows, until there are ``limit`` in all; its columns are returned.

    `datasets` writes streams, most other programs files; which one it is shows in the first bytes.
    Raises OSError and DataError.
    """
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            magic = source.read(6)
            source.seek(0)
            columns, batches = _batches(pyarrow, source, magic == b"ARROW1")
            for batch in batches:
                # What points outside its buffers would be read there.
                batch.validate(full=True)
                require_likely(path, len(rows) + batch.num_rows)
                if limit is not None and len(rows) + batch.num_rows > limit:
                    batch = batch.slice(0, limit - len(rows))
                for start in range(0, batch.num_rows, ROWS_AT_ONCE):  # a batch may be all rows
                    rows.extend(batch.slice(start, ROWS_AT_ONCE).to_pylist())
                if len(rows) == limit:
                    break
    except (pyarrow.ArrowException, *UNREADABLE) as error:
        raise DataError(f"{path} cannot be read as Arrow: {reason(error)}.") from error
    return list(columns)


def _batches(pyarrow: Any, source: Any, is_file: bool) -> tuple[list[str], Iterator[Any]]:
    if is_file:
        file = pyarrow.ipc.open_file(source)
        return file.schema.names, (file.get_batch(i) for i in range(file.num_record_batches))
    stream = pyarrow.ipc.open_stream(source)
    return stream.schema.names, iter(stream)
