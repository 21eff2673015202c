"""Rows of more tokens than ``data.max_length``: cut on a side, left out, or split into pieces.

A row may begin with tokens that every text of the model begins with (most often the
beginning-of-sequence token). What is left of it begins with them too. The first token behind them
is then not learned if another one was before it in the row: it would be learned as the beginning of
a text, which it is not. So pieces overlap by one token, which is context in the later of the two,
and what the row has labels for is learned once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.tokenize import leading_ids
from halfbyte.recipe.data_schema import LongRows

TOO_LONG = "more tokens than data.max_length"


@dataclass(frozen=True)
class Leading:
    """What rows begin with: ``added`` by the tokenizer, or the token ``bos`` out of a template."""

    added: tuple[int, ...]
    bos: int | None

    @classmethod
    def of(cls, tokenizer: Any) -> Leading:
        return cls(tuple(leading_ids(tokenizer)), tokenizer.bos_token_id)

    def count(self, ids: Sequence[int] | np.ndarray) -> int:
        """Tokens at the beginning of ``ids`` that all that is left of a row begins with.

        A token that the model has for BOS and that stands in the row again is another one: some
        models begin each turn with it.
        """
        if self.added:
            front = tuple(ids[: len(self.added)])
            return len(self.added) if front == self.added else 0
        if self.bos is None or not len(ids) or ids[0] != self.bos:
            return 0
        return int(np.count_nonzero(np.asarray(ids) == self.bos) == 1)


@dataclass(frozen=True, slots=True)
class Span:
    """What is left of a row: ``lead`` leading tokens, and of those behind them ``start`` to
    ``stop``. ``cut`` tokens were taken off for good; what a piece has not and another one has does
    not count."""

    lead: int
    start: int
    stop: int
    cut: int = 0


def spans_of(row: TokenizedRow, max_length: int, how: LongRows, leading: Leading) -> list[Span]:
    """What becomes of ``row``, which has more than ``max_length`` tokens.

    ``cut_right`` takes off its end, ``cut_left`` its beginning behind the leading tokens, ``drop``
    gives nothing, and ``split`` gives consecutive pieces, some of which may have no label. Raises
    ValueError where leading tokens leave no room for two others.
    """
    over = len(row) - max_length
    if how == "drop":
        return []
    if how == "cut_right":
        return [Span(0, 0, max_length, over)]
    lead = leading.count(row.input_ids)
    room = max_length - lead
    if room < 2:
        raise ValueError(f"{lead} leading tokens leave no room in {max_length}")
    body = len(row) - lead
    if how == "cut_left":
        return [Span(lead, body - room, body, over)]
    starts = range(0, body - 1, room - 1)  # the first token of the next is the last of this one
    return [Span(lead, start, min(start + room, body)) for start in starts]


def piece_of(row: TokenizedRow, span: Span) -> TokenizedRow:
    """What ``span`` says is left of ``row``; its arrays are copies."""
    begin, end = span.lead + span.start, span.lead + span.stop
    at = np.r_[0 : span.lead, begin:end]
    learned = row.loss_mask[at]
    if span.start:
        learned[span.lead] = False
    return TokenizedRow(row.input_ids[at], learned, row.row, row.cut + span.cut, span.start)


def fit_row(
    row: TokenizedRow, max_length: int, how: LongRows, leading: Leading
) -> list[TokenizedRow]:
    """The rows of at most ``max_length`` tokens that ``row`` becomes: itself if it is no longer.

    What is taken off is counted in ``cut``, and where a row begins that has lost its beginning in
    ``start``. See :func:`spans_of`.
    """
    if len(row) <= max_length:
        return [row]
    return [piece_of(row, span) for span in spans_of(row, max_length, how, leading)]
