"""Tokenized rows in flat arrays: one after another, in memory or in files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.by_place import ByPlace

_FILES = {
    "ids": np.int32,
    "mask": np.bool_,
    "lengths": np.int64,
    "numbers": np.int64,
    "labels": np.int64,
}
_COUNTS = "rows.json"
_READ_AT_ONCE = 1 << 22  # bytes


@dataclass(frozen=True, eq=False)
class RowStore(ByPlace[TokenizedRow]):
    """Rows end to end: ``ids`` int32 [tokens], ``mask`` bool [tokens].

    ``lengths`` int64 [rows] are their tokens, ``numbers`` int64 [rows] theirs in their source and
    ``labels`` int64 [rows] how many tokens of each carry loss. A row that is asked for is views of
    the arrays, so that a million rows cost no object each; arrays of tokens from files are mapped,
    and their pages are the system's to keep or to drop.
    """

    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    numbers: np.ndarray
    labels: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def at(self, place: int) -> TokenizedRow:
        end = int(self.ends[place])
        begin = end - int(self.lengths[place])
        return TokenizedRow(self.ids[begin:end], self.mask[begin:end], int(self.numbers[place]))

    @classmethod
    def of(cls, rows: Sequence[TokenizedRow]) -> RowStore:
        """``rows``, which are whole, in memory."""
        return cls._of(_arrays(rows))

    @classmethod
    def joined(cls, stores: Sequence[RowStore]) -> RowStore:
        """The rows of ``stores`` one after another, in memory."""
        return cls._of({n: np.concatenate([getattr(s, n) for s in stores]) for n in _FILES})

    @classmethod
    def _of(cls, arrays: dict[str, np.ndarray]) -> RowStore:
        return cls(**arrays, ends=np.cumsum(arrays["lengths"]))

    @classmethod
    def read(cls, folder: Path, *, check: bool = True) -> RowStore | None:
        """What a :class:`RowWriter` finished in ``folder``; None where it did not, or not so.

        ``check`` reads all of it for that.
        """
        try:
            found = json.loads((folder / _COUNTS).read_text(encoding="utf-8"))
            arrays = {}
            for name, dtype in _FILES.items():
                path = folder / f"{name}.bin"
                count = found["tokens"] if name in ("ids", "mask") else found["rows"]
                if path.stat().st_size != count * np.dtype(dtype).itemsize:
                    return None
                if check and _checksum(path) != found["crc32"][name]:
                    return None
                arrays[name] = _mapped(path, dtype) if count else np.empty(0, dtype)
            return cls._of(arrays)
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _mapped(path: Path, dtype: type) -> np.ndarray:
    # As a plain array: the class memmap makes each view ten times as dear.
    return np.asarray(np.memmap(path, dtype, mode="r"))


def _arrays(rows: Sequence[TokenizedRow]) -> dict[str, np.ndarray]:
    count = len(rows)
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=count)
    mask = np.concatenate([np.empty(0, np.bool_), *(row.loss_mask for row in rows)])
    ends = np.cumsum(lengths)
    learned = mask.copy()
    learned[(ends - lengths)[lengths > 0]] = False  # nothing predicts a row's first token
    before = np.concatenate([[0], np.cumsum(learned)])
    return {
        "ids": np.concatenate([np.empty(0, np.int32), *(row.input_ids for row in rows)]),
        "mask": mask,
        "lengths": lengths,
        "numbers": np.fromiter((row.row for row in rows), dtype=np.int64, count=count),
        "labels": before[ends] - before[ends - lengths],
    }


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_READ_AT_ONCE):
            value = zlib.crc32(chunk, value)
    return value


class RowWriter:
    """Appends rows to files in ``folder``, or to arrays in memory; ``finish`` makes them whole."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._stores: list[RowStore] = []
        self._counts = {"rows": 0, "tokens": 0}
        self._crc32 = dict.fromkeys(_FILES, 0)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _COUNTS).unlink(missing_ok=True)
            self._files = {name: (folder / f"{name}.bin").open("wb") for name in _FILES}

    def extend(self, rows: Sequence[TokenizedRow]) -> None:
        if not rows:
            return
        arrays = _arrays(rows)
        if self.folder is None:
            self._stores.append(RowStore(**arrays, ends=arrays["lengths"]))
            return
        for name, array in arrays.items():
            written = array.tobytes()
            self._files[name].write(written)
            self._crc32[name] = zlib.crc32(written, self._crc32[name])
        self._counts["rows"] += len(rows)
        self._counts["tokens"] += len(arrays["ids"])

    def close(self) -> None:
        """Close the files as they are."""
        if self.folder is not None:
            for file in self._files.values():
                file.close()

    def finish(self) -> RowStore:
        """All rows that were appended; files are complete now."""
        if self.folder is None:
            return RowStore.joined(self._stores) if self._stores else RowStore.of([])
        self.close()
        whole = json.dumps({**self._counts, "crc32": self._crc32})
        (self.folder / _COUNTS).write_text(whole, encoding="utf-8")
        found = RowStore.read(self.folder, check=False)
        if found is None:
            raise OSError(0, "what was written is not there", str(self.folder))
        return found
