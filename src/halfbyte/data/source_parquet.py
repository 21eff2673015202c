"""Parquet files."""

from __future__ import annotations

from pathlib import Path

from halfbyte.data.table import Cells, Table
from halfbyte.data.text_file import sha256_of
from halfbyte.errors import DataError

ROWS_AT_ONCE = 4096


def read_parquet(path: Path, limit: int | None) -> Table:
    """The first ``limit`` rows; row groups behind them are not read."""
    import pyarrow
    import pyarrow.parquet

    rows: list[Cells] = []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = list(file.schema_arrow.names)
            size = ROWS_AT_ONCE if limit is None else min(limit, ROWS_AT_ONCE)
            for batch in file.iter_batches(batch_size=size):
                rows += batch.to_pylist()
                if limit is not None and len(rows) >= limit:
                    break
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{path} cannot be read as Parquet: {reason}.") from error
    return Table(columns, rows[:limit], sha256_of(path), typed=True)
