"""Rows that are the same as an earlier one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from halfbyte.data.cleaning.parts import Verdict, part, shown_part
from halfbyte.data.cleaning.words import normalized
from halfbyte.data.example import Example
from halfbyte.recipe.cleaning import ExactDuplicates, Part

DIGEST = 16  # bytes: of a million million rows, two different ones share it by a chance of 1e-15


def exact_duplicates(settings: ExactDuplicates, examples: Sequence[Example]) -> Iterator[Verdict]:
    """The first of rows that are the same stays. A question or answer that is empty is no copy.

    Keeps a digest of each row that differs: about 200 bytes with what Python adds.
    """
    first: dict[bytes, int] = {}
    for index, example in enumerate(examples):
        key = row_key(example, settings.by, normalize=settings.normalize)
        earlier = None if key is None else first.setdefault(key, index)
        if earlier is None or earlier == index:
            yield None
        else:
            shown = shown_part(example, settings.by)
            yield f"as {name_of(examples[earlier], example)}: {shown}"


def row_key(example: Example, by: Part, *, normalize: bool) -> bytes | None:
    """A digest that rows have in common if they are the same; None where there is no text."""
    if by == "row" and not normalize:
        return digest(_whole(example))
    text = part(example, by)
    text = normalized(text) if normalize else text
    return digest(text) if text.strip() else None


def _whole(example: Example) -> str:
    """All that makes the row, so that other roles or tools make another one."""
    return json.dumps(
        [
            example.text,
            example.instruction,
            example.input,
            [
                [m.role, m.content, m.reasoning, list(map(dict, m.tool_calls)), m.name, m.learn]
                for m in example.messages
            ],
            list(map(dict, example.tools)),
        ],
        sort_keys=True,
        default=str,
    )


def digest(text: str) -> bytes:
    """``DIGEST`` bytes that tell ``text`` from others."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST).digest()


def name_of(other: Example, example: Example) -> str:
    """``row 17``, counted from 1; with its source where that is not the one of ``example``."""
    source = "" if other.source == example.source else f" of source {other.source + 1}"
    return f"row {other.row + 1:,}{source}"
