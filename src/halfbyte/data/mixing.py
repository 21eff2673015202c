"""How many rows of each source stand in an epoch, and which.

A source gives all of its rows, or so many (``rows``), or a share (``weight``). Shares are kept
exactly, to the row: the mix is the largest in which no source with a weight gives more than it
has, which is each of its rows ``repeat`` times, once unless the recipe says more. So the source
that is scarcest for its weight is used up and of the others the rest is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from halfbyte.events.types import Choice
from halfbyte.recipe.data_schema import SourceRecipe


@dataclass(frozen=True)
class Mix:
    """How often each row stands in an epoch: ``times`` int64 [rows], sources one after another."""

    times: np.ndarray
    choices: list[Choice]
    warnings: list[str]


def mix(sources: Sequence[SourceRecipe], available: Sequence[int], seed: int) -> Mix:
    """What to take of ``sources``, which have so many rows ``available``.

    The same seed takes the same rows of a source, whatever the other sources are, as long as it
    takes as many.
    """
    counts = mixed_counts(sources, available)
    times = [
        draw(rows, count, (seed, number))
        for number, (rows, count) in enumerate(zip(available, counts, strict=True))
    ]
    return Mix(
        np.concatenate([np.empty(0, np.int64), *times]),
        _choices(sources, available, counts),
        _warnings(sources, available, counts),
    )


def mixed_counts(sources: Sequence[SourceRecipe], available: Sequence[int]) -> list[int]:
    """Rows of each source in an epoch; one that stands twice counts twice."""
    most = [source.repeat * rows for source, rows in zip(sources, available, strict=True)]
    weights = [_exact(source.weight) for source in sources]
    scales = [Fraction(m) / w for m, w in zip(most, weights, strict=True) if w is not None]
    scale = min(scales, default=Fraction(0))
    return [
        int(scale * weight) if weight is not None else min(m, source.rows or m)
        for source, m, weight in zip(sources, most, weights, strict=True)
    ]


def draw(rows: int, count: int, seed: Sequence[int]) -> np.ndarray:
    """How often each of ``rows`` rows stands among ``count``, as evenly as can be: int64 [rows]."""
    if not rows:
        return np.zeros(0, dtype=np.int64)
    whole, rest = divmod(count, rows)
    times = np.full(rows, whole, dtype=np.int64)
    if rest:
        times[np.random.default_rng(list(seed)).choice(rows, rest, replace=False)] += 1
    return times


def _exact(weight: float | int | None) -> Fraction | None:
    """A weight as it was written: 0.1 is a tenth, not the double next to it."""
    return None if weight is None else Fraction(str(weight))


def _choices(
    sources: Sequence[SourceRecipe], available: Sequence[int], counts: Sequence[int]
) -> list[Choice]:
    if len(sources) == 1 and counts[0] == available[0]:
        return []
    total = max(1, sum(counts))
    taken = "; ".join(
        f"{count:,} of {rows:,} of {source.path} ({count / total:.1%})"
        for source, rows, count in zip(sources, available, counts, strict=True)
    )
    reason = "all rows of each"
    scarce = _scarcest(sources, available)
    if scarce is not None:
        reason = f"{sources[scarce].path} is the scarcest for its weight and is used up"
    elif any(source.rows for source in sources):
        reason = "as many as the recipe says, drawn by the seed"
    elif any(source.repeat > 1 for source in sources):
        reason = "all rows of each, as often as the recipe says"
    return [Choice("data.sources", None, taken, reason)]


def _scarcest(sources: Sequence[SourceRecipe], available: Sequence[int]) -> int | None:
    weighed = [
        (Fraction(source.repeat * rows) / weight, number)
        for number, (source, rows) in enumerate(zip(sources, available, strict=True))
        if (weight := _exact(source.weight)) is not None
    ]
    return min(weighed)[1] if weighed else None


def _warnings(
    sources: Sequence[SourceRecipe], available: Sequence[int], counts: Sequence[int]
) -> list[str]:
    found = []
    for source, rows, count in zip(sources, available, counts, strict=True):
        if source.rows is not None and count < source.rows:
            often = "" if source.repeat == 1 else f", each {source.repeat} times"
            found.append(
                f"{source.path} has {rows:,} rows{often}, and {source.rows:,} are asked for; all "
                "of them are taken, and repeat says how often a row may stand in an epoch."
            )
        if rows and not count:
            found.append(
                f"the weight of {source.path} is so small that not one of its {rows:,} rows is "
                "taken."
            )
    return found
