"""What the terminal says of the rows as they will be trained."""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.cli.blocks import Block
from halfbyte.data.audit.lengths import Bin
from halfbyte.events.types import Found

BAR = 40  # characters of the longest bar
_EIGHTHS = " ▏▎▍▌▋▊▉"


def histogram_block(bins: Sequence[Bin], max_length: int) -> Block:
    """How many rows are how long, with a bar each."""
    labels = [_label(one) for one in bins]
    width = max(map(len, labels), default=0)
    most = max((one.rows for one in bins), default=1)
    digits = len(f"{most:,}")
    lines = [
        f"{label:>{width}}  {one.rows:>{digits},}  {_bar(one.rows / max(1, most))}"
        + ("  cut" if one.first > max_length else "")
        for label, one in zip(labels, bins, strict=True)
    ]
    return Block("lengths", [line.rstrip() for line in ["tokens and rows", *lines]])


def _label(one: Bin) -> str:
    if one.last is None:
        return f"{one.first:,}…"
    return f"{one.first:,}" if one.first == one.last else f"{one.first:,}–{one.last:,}"


def _bar(share: float) -> str:
    """A bar of at most BAR characters, to an eighth of one; what is there at all is seen."""
    eighths = max(round(share * BAR * 8), 1 if share > 0 else 0)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def in_all(findings: Sequence[Found]) -> str:
    """``2 errors, 1 warning: a run would not begin``."""
    counts = [
        (sum(one.stops for one in findings), "error"),
        (sum(one.accepted for one in findings), "accepted error"),
        (sum(one.severity == "warning" for one in findings), "warning"),
        (sum(one.severity == "note" for one in findings), "note"),
    ]
    words = ", ".join(f"{n:,} {name}{'s' if n > 1 else ''}" for n, name in counts if n)
    if counts[0][0]:
        return f"{words}: a run would not begin; mend them or accept them by name in data.accept"
    return words or "nothing that could spoil a run"
