"""What must be the same for a run to go on: hashes of its rows, and versions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.prepare import Prepared

TRAIN, HELD_OUT, DATA = "rows that train", "rows held out", "data"


def data_hashes(data: Prepared) -> dict[str, str]:
    """SHA-256 of the rows as they are tokenized, and of the data files that they came from."""
    hashes = {TRAIN: rows_hash(data.train), HELD_OUT: rows_hash(data.held_out)}
    if data.audit.sha256 is not None:
        hashes[DATA] = data.audit.sha256
    return hashes


def rows_hash(rows: Iterable[TokenizedRow]) -> str:
    """SHA-256 of the tokens of ``rows`` and of which of them carry loss."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row.input_ids).to_bytes(8, "little"))
        digest.update(row.input_ids.tobytes())
        digest.update(row.loss_mask.tobytes())
    return digest.hexdigest()


@cache
def package_versions() -> dict[str, str]:
    """Versions that decide a run's bits."""
    return {name: version(name) for name in ("torch", "transformers", "halfbyte")}
