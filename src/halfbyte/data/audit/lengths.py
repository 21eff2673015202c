"""How long the rows are, and what of them is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from halfbyte.data.audit.subject import NOTHING_LEFT, Subject
from halfbyte.data.fitted import sizes_shown
from halfbyte.data.long_rows import TOO_LONG
from halfbyte.events.types import Found

PERCENTILES = (0, 50, 90, 99, 100)
# From this share of the rows on, the user is told.
MANY_CUT = 0.05
# Fewer rows than this are learned by heart rather than from.
FEW = 50
BINS = 14


def percentile(lengths: Sequence[int] | np.ndarray, percent: float) -> int:
    """The smallest of ``lengths`` that at least ``percent`` % of them do not exceed."""
    return int(np.percentile(np.asarray(lengths), percent, method="inverted_cdf"))


def length_percentiles(lengths: Sequence[int] | np.ndarray) -> dict[str, int]:
    """Percentiles by their number, as the audit holds them."""
    return {str(percent): percentile(lengths, percent) for percent in PERCENTILES}


@dataclass(frozen=True)
class Bin:
    """``rows`` of ``first`` to ``last`` tokens; ``last`` is None where the bin has no end."""

    first: int
    last: int | None
    rows: int


def histogram(lengths: Sequence[int] | np.ndarray) -> list[Bin]:
    """At most 15 bins of one round width; the longest hundredth of the rows shares the last."""
    if not len(lengths):
        return []
    counted = np.asarray(lengths)
    low, high = int(counted.min()), percentile(lengths, 99)
    width = _round_width(max(1, high - low + 1) / BINS)
    start = low // width * width
    edges = np.arange(start, high + width + 1, width)
    inside = counted[counted < edges[-1]]
    rows = np.histogram(inside, bins=edges)[0].tolist()
    bins = [Bin(int(e), int(e) + width - 1, n) for e, n in zip(edges[:-1], rows, strict=True)]
    beyond = len(counted) - len(inside)
    return [*bins, Bin(int(edges[-1]), None, beyond)] if beyond else bins


def _round_width(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, … that is at least ``least``."""
    unit = 1
    while True:
        for factor in (1, 2, 5):
            if factor * unit >= least:
                return factor * unit
        unit *= 10


def find_lengths(subject: Subject) -> list[Found]:
    """Findings on rows that are cut, rows that teach nothing, and on how few there are."""
    return [*_cut(subject), *_nothing(subject), *_few(subject)]


def _cut(subject: Subject) -> list[Found]:
    cuts, lengths = sizes_shown(subject.tokenized)
    cut = np.flatnonzero(cuts).tolist()
    count = len(cuts)
    if not cut or len(cut) < MANY_CUT * count:
        return []
    tokens = int(cuts.sum())
    share = tokens / (tokens + int(lengths.sum()))
    from_left = subject.data.long_rows == "cut_left"
    lost = "the beginning of their question" if from_left else "the end of their answer"
    return [
        subject.found(
            "cut-rows",
            "warning",
            f"{len(cut):,} of {count:,} rows are longer than {subject.max_length:,} tokens and "
            f"lose {lost} ({share:.1%} of all tokens)",
            "raise data.max_length or shorten the rows",
            cut,
        )
    ]


def _nothing(subject: Subject) -> list[Found]:
    """Rows that were left out since there is nothing to learn, or more than fits."""
    length = f"{subject.max_length:,} tokens"
    return [
        *subject.left_out(
            "nothing-learned",
            NOTHING_LEFT,
            f"hold no token that is learned once they are cut to {length}, and are left out",
            "raise data.max_length or shorten the questions",
        ),
        *subject.left_out(
            "too-long",
            TOO_LONG,
            f"are longer than {length} and left out, as data.long_rows says",
            "raise data.max_length, or cut or split them by data.long_rows",
        ),
    ]


def _few(subject: Subject) -> list[Found]:
    count = len(subject.rows)
    if count >= FEW:
        return []
    return [
        subject.found(
            "few-rows",
            "warning",
            f"{count:,} rows train, and so few are learned by heart rather than from",
            "collect some hundreds of them",
        )
    ]
