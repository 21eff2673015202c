"""A row as the model sees it, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.data.audit.private import hidden
from halfbyte.data.batch import Segment, TokenizedRow
from halfbyte.data.long_rows import Leading
from halfbyte.data.tokenize import leading_ids, whole_characters


@dataclass(frozen=True)
class Piece:
    """One token: its text (empty where it shares a character with the one before), and its loss."""

    id: int
    text: str
    learned: bool


@dataclass(frozen=True)
class RowAsTrained:
    """A row with its tokens; ``row`` is its number in its source, both counted from 0."""

    row: int
    source: int
    cut: int  # tokens that were taken off
    pieces: list[Piece]


def pieces_of(tokenizer: Any, segments: Sequence[Segment], row: TokenizedRow) -> list[Piece]:
    """The tokens of ``row`` with the text that each stands for, private data hidden.

    Joined, the texts are what was tokenized, special tokens included, as far as the row has it.
    """
    text = whole_characters("".join(segment.text for segment in segments))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [end for _, end in encoded["offset_mapping"]]
    if ends:
        ends[-1] = len(text)  # what the tokenizer passed over at the end is shown too
    shown, start = hidden(text), 0
    texts: list[str] = []
    for end in ends:
        texts.append(shown[start : max(start, end)])
        start = max(start, end)
    lead = leading_ids(tokenizer)
    if lead and encoded["input_ids"][:1] != lead[:1]:
        texts = [*tokenizer.convert_ids_to_tokens(lead), *texts]
    front = Leading.of(tokenizer).count(row.input_ids) if row.start else 0
    first = front + row.start
    texts = [*texts[:front], *texts[first : first + len(row) - front]]
    return [
        Piece(token, text, learned)
        for token, text, learned in zip(
            row.input_ids.tolist(), texts, row.loss_mask.tolist(), strict=True
        )
    ]


def runs_of(pieces: Sequence[Piece]) -> list[tuple[str, bool]]:
    """Neighbouring tokens that are alike in carrying loss as one text."""
    runs: list[tuple[str, bool]] = []
    for piece in pieces:
        if runs and (runs[-1][1] == piece.learned or not piece.text):
            # A second token of the same character has no text of its own.
            runs[-1] = (runs[-1][0] + piece.text, runs[-1][1])
        else:
            runs.append((piece.text, piece.learned))
    return runs


def sample_of(
    tokenizer: Any, segments: Sequence[Segment], row: TokenizedRow
) -> list[tuple[str, bool]]:
    """A row as the model sees it: runs of text, and whether their tokens carry loss."""
    return runs_of(pieces_of(tokenizer, segments, row))
