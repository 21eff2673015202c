"""Rows that would train and also stand among the held-out rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from halfbyte.data.cleaning.duplicates import name_of, row_key
from halfbyte.data.cleaning.parts import Verdict, shown_part
from halfbyte.data.example import Example
from halfbyte.recipe.cleaning import OverlapWithHeldOut


def overlap_with_held_out(
    settings: OverlapWithHeldOut, examples: Sequence[Example], held_out: Sequence[Example]
) -> Iterator[Verdict]:
    """Keeps 16 bytes of each held-out row; what is empty is in common with nothing."""
    known: dict[bytes | None, Example] = {}
    for row in held_out:
        known.setdefault(row_key(row, settings.by, normalize=True), row)
    known.pop(None, None)
    for example in examples:
        same = known.get(row_key(example, settings.by, normalize=True))
        if same is None:
            yield None
        else:
            shown = shown_part(example, settings.by)
            yield f"as held-out {name_of(same, example)}: {shown}"
