"""Which rows train and which are held out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from halfbyte.data.columns import Columns, find_columns, rows_of
from halfbyte.data.example import Example
from halfbyte.data.source import read_rows
from halfbyte.errors import DataError
from halfbyte.events.types import Choice
from halfbyte.recipe.schema import DataRecipe

SHARE = 20  # one row in so many is held out
MOST = 200  # an evaluation costs time, and so many rows tell a loss to about a hundredth

# Of rows set apart, so many more are read than are held out: some may have nothing to learn.
SPARE = 50


@dataclass
class Rows:
    """First the rows that may train, then those that only may be held out.

    ``apart`` is how many rows at the end cannot train; ``wanted`` how many are to be held out,
    None to decide once the usable rows are known.
    """

    rows: list[Example]
    columns: Columns
    sha256: str | None
    apart: int = 0
    wanted: int | None = None
    choices: list[Choice] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_split(data: DataRecipe) -> Rows:
    """Read what ``data`` names, no further than its limit and its held-out rows need."""
    wanted = None if data.held_out == "auto" else int(data.held_out)
    follow = data.held_out_path is None and data.held_out_from == "after"
    if follow and wanted is None and data.limit is not None:
        wanted = automatic_held_out(data.limit)
    spare = wanted + SPARE if follow and wanted else 0
    table = read_rows(data, data.limit + spare if data.limit is not None else None)
    columns = find_columns(data, table)
    rows = rows_of(table, columns, data.path)
    read = Rows(rows, columns, table.sha256, wanted=wanted)
    read.warnings += table.warnings
    for role, reason in columns.reason.items():
        read.choices.append(Choice(f"data.columns.{role}", None, columns.by_role()[role], reason))
    if data.held_out_path is not None and wanted != 0:
        apart = data.model_copy(update={"path": data.held_out_path})
        other = read_rows(apart)
        held_out = rows_of(other, find_columns(apart, other), apart.path)
        read.warnings += other.warnings
        read.rows = rows + held_out
        read.apart = len(held_out)
    elif follow:
        _set_apart(data, read)
    return read


def _set_apart(data: DataRecipe, read: Rows) -> None:
    """Let the rows after the limit, or the last ones, be those that do not train."""
    count = len(read.rows)
    if read.wanted is None:
        read.wanted = automatic_held_out(count)
    if data.limit is not None:
        read.apart = max(0, count - data.limit)
        if read.wanted and not read.apart:
            raise DataError(
                f"data.held_out_from: after, but {data.path} has {count:,} rows and data.limit "
                f"takes {data.limit:,}, so that none follows; lower data.limit or state "
                "held_out_from: random."
            )
    else:
        read.apart = min(read.wanted, count)


def choose_held_out(
    data: DataRecipe, read: Rows, usable: np.ndarray, seed: int
) -> tuple[np.ndarray, int]:
    """The rows to hold out and how many of ``read.rows`` were considered for anything.

    ``usable`` is bool [rows]: those with something to learn. Rows set apart are held out from the
    first on; where none are, the seed draws. Only usable rows are taken, so that the same count
    always takes the same ones. Appends to ``read.choices`` and ``read.warnings``.
    """
    count = len(read.rows)
    first_apart = count - read.apart
    held_out = np.zeros(count, dtype=bool)
    if read.apart or read.wanted == 0:
        candidates = first_apart + np.flatnonzero(usable[first_apart:])
        wanted = min(MOST, len(candidates)) if read.wanted is None else read.wanted
        _say(data, read, wanted, len(candidates), "the first usable ones of those set apart")
        taken = candidates[:wanted]
        held_out[taken] = True
        if len(candidates) > wanted:  # what lies behind was only read in case
            return held_out, int(taken[-1]) + 1 if wanted else first_apart
        return held_out, count
    candidates = np.flatnonzero(usable)
    wanted = automatic_held_out(len(candidates)) if read.wanted is None else read.wanted
    if wanted and wanted >= len(candidates):
        raise DataError(
            f"data.held_out: {wanted:,} rows are to be held out and there are {len(candidates):,}, "
            "so that none would train; hold out fewer."
        )
    _say(data, read, wanted, len(candidates), "drawn by the seed")
    drawn = np.random.default_rng(seed).choice(len(candidates), wanted, replace=False)
    held_out[candidates[drawn]] = True
    return held_out, count


def automatic_held_out(rows: int) -> int:
    """5 % of the rows, at most 200; none below 20 rows."""
    return min(rows // SHARE, MOST)


def _say(data: DataRecipe, read: Rows, wanted: int, candidates: int, how: str) -> None:
    if data.held_out == "auto":
        if data.held_out_path is not None:
            reason = f"of the {candidates:,} rows of {data.held_out_path}, at most {MOST}"
        elif wanted:
            reason = f"5 % of the rows, at most {MOST}, {how}"
        else:
            reason = f"fewer than {SHARE} rows are too few to hold one out"
        read.choices.append(Choice("data.held_out", "auto", wanted, reason))
    elif wanted > candidates:
        read.warnings.append(
            f"data.held_out asks for {wanted:,} rows and only {candidates:,} are there."
        )
