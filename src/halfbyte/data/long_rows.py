"""Rows of more tokens than ``data.max_length``: cut on a side, left out, or split into pieces.

A row may begin with tokens that every text of the model begins with (most often the
beginning-of-sequence token). What is left of it begins with them too. The first token behind them
is then not learned if another one was before it in the row: it would be learned as the beginning of
a text, which it is not. So pieces overlap by one token, which is context in the later of the two,
and what the row has labels for is learned once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.tokenize import cut, leading_ids
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


def fit_row(
    row: TokenizedRow, max_length: int, how: LongRows, leading: Leading
) -> list[TokenizedRow]:
    """The rows of at most ``max_length`` tokens that ``row`` becomes: itself if it is no longer.

    ``cut_right`` takes off its end, ``cut_left`` its beginning behind the leading tokens, ``drop``
    gives no row, and ``split`` gives consecutive pieces, some of which may have no label. What is
    taken off is counted in ``cut``, and where a row begins that has lost its beginning in
    ``start``. Raises ValueError where leading tokens leave no room for two others.
    """
    over = len(row) - max_length
    if over <= 0:
        return [row]
    if how == "drop":
        return []
    if how == "cut_right":
        return [cut(row, max_length)]
    lead = leading.count(row.input_ids)
    room = max_length - lead
    if room < 2:
        raise ValueError(f"{lead} leading tokens leave no room in {max_length}")
    body = len(row) - lead
    if how == "cut_left":
        return [replace(_piece(row, lead, body - room, body), cut=row.cut + over)]
    starts = range(0, body - 1, room - 1)  # the first token of the next is the last of this one
    return [_piece(row, lead, start, min(start + room, body)) for start in starts]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A row as it was tokenized, and the rows of at most ``data.max_length`` that it became."""

    whole: TokenizedRow
    pieces: list[TokenizedRow]
    learned: list[TokenizedRow]  # those of ``pieces`` that have a label

    @classmethod
    def of(cls, row: TokenizedRow, max_length: int, how: LongRows, leading: Leading) -> Fitted:
        """By :func:`fit_row`."""
        pieces = fit_row(row, max_length, how, leading)
        return cls(row, pieces, [piece for piece in pieces if piece.num_labels])

    @property
    def shown(self) -> TokenizedRow:
        """The row that stands for all: what is left of it, or the whole where it was split."""
        return self.pieces[0] if len(self.pieces) == 1 else self.whole


def count_fitted(rows: Sequence[Fitted]) -> dict[str, int]:
    """What became of long rows, as :class:`~halfbyte.events.types.Audited` has it."""
    shortened = [row.shown.cut for row in rows if row.shown.cut]
    split = [row for row in rows if len(row.pieces) > 1]
    return {
        "rows_shortened": len(shortened),
        "tokens_cut": sum(shortened),
        "rows_split": len(split),
        "pieces": sum(len(row.learned) for row in split),
        "pieces_dropped": sum(len(row.pieces) - len(row.learned) for row in split),
    }


def _piece(row: TokenizedRow, lead: int, start: int, stop: int) -> TokenizedRow:
    """Tokens ``start`` to ``stop``, counted behind the ``lead`` first ones, with those in front."""
    at = np.r_[0:lead, lead + start : lead + stop]
    learned = row.loss_mask[at]
    if start:
        learned[lead] = False
    return replace(row, input_ids=row.input_ids[at], loss_mask=learned, start=start)
