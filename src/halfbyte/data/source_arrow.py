"""Arrow files: the stream and the file of its IPC format; the latter is also called Feather."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfbyte.data.table import CellStore, Table
from halfbyte.data.text_file import sha256_of
from halfbyte.errors import DataError

ROWS_AT_ONCE = 4096


def read_arrow(path: Path, limit: int | None) -> Table:
    """The first ``limit`` rows; batches behind them are not read.

    `datasets` writes streams, most other programs files; which one it is shows in the first bytes.
    """
    import pyarrow

    rows = CellStore()
    try:
        with pyarrow.memory_map(str(path)) as source:
            magic = source.read(6)
            source.seek(0)
            columns, batches = _batches(pyarrow, source, magic == b"ARROW1")
            for batch in batches:
                if limit is not None and len(rows) + batch.num_rows > limit:
                    batch = batch.slice(0, limit - len(rows))
                for start in range(0, batch.num_rows, ROWS_AT_ONCE):  # a batch may be all rows
                    rows.extend(batch.slice(start, ROWS_AT_ONCE).to_pylist())
                if len(rows) == limit:
                    break
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{path} cannot be read as Arrow: {reason}.") from error
    return Table(list(columns), rows, sha256_of(path), typed=True)


def _batches(pyarrow: Any, source: Any, is_file: bool) -> tuple[list[str], Iterator[Any]]:
    if is_file:
        file = pyarrow.ipc.open_file(source)
        return file.schema.names, (file.get_batch(i) for i in range(file.num_record_batches))
    stream = pyarrow.ipc.open_stream(source)
    return stream.schema.names, iter(stream)
