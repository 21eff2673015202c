"""Tokenized rows in flat arrays: one after another, in memory or in files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from halfbyte.data.batch import TokenizedRow

_FILES = {"ids": np.int32, "mask": np.bool_, "starts": np.int64, "numbers": np.int64}
_COUNTS = "rows.json"


@dataclass(frozen=True)
class RowStore(Sequence[TokenizedRow]):
    """Rows end to end: ``ids`` int32 [tokens], ``mask`` bool [tokens], ``starts`` int64 [rows + 1].

    ``numbers`` int64 [rows] are theirs in their source. A row that is asked for is views of the
    arrays, so that a million rows cost no object each; arrays of files are mapped, and their pages
    are the system's to keep or to drop.
    """

    ids: np.ndarray
    mask: np.ndarray
    starts: np.ndarray
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> TokenizedRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenizedRow]: ...

    def __getitem__(self, index: int | slice) -> TokenizedRow | list[TokenizedRow]:
        if isinstance(index, slice):
            return [self._row(i) for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"there is no row {index} among {len(self)}")
        return self._row(place)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self.starts)

    def _row(self, place: int) -> TokenizedRow:
        begin, end = int(self.starts[place]), int(self.starts[place + 1])
        return TokenizedRow(self.ids[begin:end], self.mask[begin:end], int(self.numbers[place]))

    @classmethod
    def of(cls, rows: Sequence[TokenizedRow]) -> RowStore:
        """``rows``, which are whole, in memory."""
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        return cls(
            ids=np.concatenate([np.empty(0, np.int32), *(row.input_ids for row in rows)]),
            mask=np.concatenate([np.empty(0, np.bool_), *(row.loss_mask for row in rows)]),
            starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            numbers=np.fromiter((row.row for row in rows), dtype=np.int64, count=len(rows)),
        )

    @classmethod
    def read(cls, folder: Path) -> RowStore | None:
        """What a :class:`RowWriter` finished in ``folder``; None where it did not, or not whole."""
        try:
            counts = json.loads((folder / _COUNTS).read_text(encoding="utf-8"))
            sizes = {
                "ids": counts["tokens"],
                "mask": counts["tokens"],
                "starts": counts["rows"] + 1,
                "numbers": counts["rows"],
            }
            arrays = {}
            for name, dtype in _FILES.items():
                path = folder / f"{name}.bin"
                if path.stat().st_size != sizes[name] * np.dtype(dtype).itemsize:
                    return None
                empty = sizes[name] == 0  # which cannot be mapped
                arrays[name] = np.empty(0, dtype) if empty else np.memmap(path, dtype, mode="r")
            return cls(**arrays)
        except (OSError, ValueError, KeyError, TypeError):
            return None


class RowWriter:
    """Appends rows to files in ``folder``; ``finish`` makes them whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _COUNTS).unlink(missing_ok=True)
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in _FILES}
        self._tokens = self._rows = 0
        self._files["starts"].write(np.zeros(1, np.int64).tobytes())

    def extend(self, rows: Sequence[TokenizedRow]) -> None:
        if not rows:
            return
        store = RowStore.of(rows)
        self._files["ids"].write(store.ids.tobytes())
        self._files["mask"].write(store.mask.tobytes())
        self._files["starts"].write((store.starts[1:] + self._tokens).tobytes())
        self._files["numbers"].write(store.numbers.tobytes())
        self._tokens += len(store.ids)
        self._rows += len(store)

    def finish(self) -> RowStore:
        """All rows that were appended, from the files, which are complete now."""
        for file in self._files.values():
            file.close()
        counts = {"rows": self._rows, "tokens": self._tokens}
        (self.folder / _COUNTS).write_text(json.dumps(counts), encoding="utf-8")
        found = RowStore.read(self.folder)
        if found is None:
            raise OSError(f"what was written to {self.folder} is not there")
        return found
