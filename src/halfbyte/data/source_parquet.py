"""Parquet files."""

from __future__ import annotations

from pathlib import Path

from halfbyte.data.source_arrow import UNREADABLE, reason
from halfbyte.data.table import CellStore, Table
from halfbyte.data.text_file import require_likely, sha256_of
from halfbyte.errors import DataError

ROWS_AT_ONCE = 4096


def read_parquet(path: Path, limit: int | None) -> Table:
    """The first ``limit`` rows; row groups behind them are not read."""
    import pyarrow
    import pyarrow.parquet

    rows = CellStore()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = list(file.schema_arrow.names)
            require_likely(path, file.metadata.num_rows)
            size = ROWS_AT_ONCE if limit is None else min(limit, ROWS_AT_ONCE)
            for batch in file.iter_batches(batch_size=size):
                if limit is not None and len(rows) + batch.num_rows > limit:
                    batch = batch.slice(0, limit - len(rows))
                rows.extend(batch.to_pylist())
                if len(rows) == limit:
                    break
    except (pyarrow.ArrowException, *UNREADABLE) as error:
        raise DataError(f"{path} cannot be read as Parquet: {reason(error)}.") from error
    return Table(columns, rows, sha256_of(path), typed=True)
