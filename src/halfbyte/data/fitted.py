"""Tokenized rows cut to ``data.max_length``, as they are asked for.

What is known of every piece stands in a few arrays; its tokens are taken out of the row when a
batch wants them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.by_place import ByPlace
from halfbyte.data.long_rows import Leading, Span, piece_of, spans_of
from halfbyte.data.row_store import RowStore
from halfbyte.recipe.data_schema import LongRows


@dataclass(frozen=True)
class Fitted:
    """The pieces of at most ``data.max_length`` tokens that the rows of ``whole`` became.

    ``counts`` int64 [rows] is how many each has, ``firsts`` int64 [rows] the number of its first;
    the others follow that. Of each piece, int64 [pieces]: ``rows`` is its row, ``labels`` counts
    its tokens with loss, and ``lead``, ``start``, ``stop`` and ``cut`` are its Span.
    """

    whole: RowStore
    counts: np.ndarray
    firsts: np.ndarray
    rows: np.ndarray
    lead: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    cut: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, whole: RowStore, max_length: int, how: LongRows, leading: Leading) -> Fitted:
        """By :func:`halfbyte.data.long_rows.spans_of`, which is asked for long rows alone."""
        long = np.flatnonzero(whole.lengths > max_length)
        counts = np.ones(len(whole), dtype=np.int64)
        found = array("q")
        for row in long.tolist():
            tokens = whole.at(row)
            spans = spans_of(tokens, max_length, how, leading)
            counts[row] = len(spans)
            for span in spans:
                labels = piece_of(tokens, span).num_labels
                found.extend((span.lead, span.start, span.stop, span.cut, labels))
        rows = np.repeat(np.arange(len(whole)), counts)
        table = np.zeros((5, len(rows)), dtype=np.int64)
        table[2], table[4] = whole.lengths[rows], whole.labels[rows]
        is_long = np.zeros(len(whole), dtype=bool)
        is_long[long] = True
        table[:, is_long[rows]] = np.frombuffer(found, np.int64).reshape(-1, 5).T
        return cls(whole, counts, np.cumsum(counts) - counts, rows, *table)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each piece, int64 [pieces]."""
        return self.lead + self.stop - self.start

    def piece(self, number: int) -> TokenizedRow:
        """The tokens of a piece."""
        row = self.whole.at(int(self.rows[number]))
        span = Span(*(int(a[number]) for a in (self.lead, self.start, self.stop, self.cut)))
        return row if span == Span(0, 0, len(row), 0) else piece_of(row, span)

    def learned_of(self, rows: np.ndarray) -> np.ndarray:
        """The numbers of the pieces of ``rows`` that have a label, in that order, int64."""
        pieces = in_runs(self.firsts[rows], self.counts[rows])
        return pieces[self.labels[pieces] > 0]

    def count(self, rows: np.ndarray) -> dict[str, int]:
        """What became of ``rows`` that were long, as :class:`~halfbyte.events.types.Audited` has
        it; those that stand in ``rows`` twice count twice."""
        cut = self.cuts(rows)
        split = rows[self.counts[rows] > 1]
        pieces, learned = int(self.counts[split].sum()), len(self.learned_of(split))
        return {
            "rows_shortened": int(np.count_nonzero(cut)),
            "tokens_cut": int(cut.sum()),
            "rows_split": len(split),
            "pieces": learned,
            "pieces_dropped": pieces - learned,
        }

    def cuts(self, rows: np.ndarray) -> np.ndarray:
        """Tokens that were taken off each of ``rows``, int64; none off one that was split."""
        found = np.zeros(len(rows), dtype=np.int64)
        one = self.counts[rows] == 1
        found[one] = self.cut[self.firsts[rows[one]]]
        return found


def in_runs(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``counts[i]`` numbers from ``firsts[i]`` on, for each i one run after another; int64."""
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(firsts, counts) + within


class Pieces(ByPlace[TokenizedRow]):
    """Some of the pieces, by their ``numbers``, int64."""

    def __init__(self, fitted: Fitted, numbers: np.ndarray) -> None:
        self._fitted, self._numbers = fitted, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def at(self, place: int) -> TokenizedRow:
        return self._fitted.piece(int(self._numbers[place]))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, int64."""
        return self._fitted.lengths[self._numbers]

    @property
    def labels(self) -> np.ndarray:
        """Tokens of each that carry loss, int64."""
        return self._fitted.labels[self._numbers]

    @property
    def cuts(self) -> np.ndarray:
        """Tokens that were taken off each, int64."""
        return self._fitted.cut[self._numbers]


class Shown(ByPlace[TokenizedRow]):
    """What stands for each of ``rows``: what is left of it, or the whole where it was split."""

    def __init__(self, fitted: Fitted, rows: np.ndarray) -> None:
        self._fitted, self._rows = fitted, rows

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, place: int) -> TokenizedRow:
        fitted, row = self._fitted, int(self._rows[place])
        if fitted.counts[row] == 1:
            return fitted.piece(int(fitted.firsts[row]))
        return fitted.whole.at(row)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, int64."""
        return self._fitted.whole.lengths[self._rows] - self.cuts

    @property
    def cuts(self) -> np.ndarray:
        """Tokens that were taken off each, int64."""
        return self._fitted.cuts(self._rows)


def sizes_of(rows: Sequence[TokenizedRow]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels of each of ``rows``, int64 each."""
    if isinstance(rows, Pieces):
        return rows.lengths, rows.labels
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    labels = np.fromiter((row.num_labels for row in rows), dtype=np.int64, count=len(rows))
    return lengths, labels


def sizes_shown(rows: Sequence[TokenizedRow]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens taken off each of ``rows``, and those that it has, int64 each."""
    if isinstance(rows, Shown):
        return rows.cuts, rows.lengths
    cuts = np.fromiter((row.cut for row in rows), dtype=np.int64, count=len(rows))
    return cuts, np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
