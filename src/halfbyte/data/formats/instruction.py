"""A question, perhaps with an input, and its answer: the rows of Alpaca and of most tables.

Where a column has what was said before, the question is the last one of a conversation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from halfbyte.data.columns import Columns
from halfbyte.data.example import Example, Message
from halfbyte.data.formats.cells import text_of
from halfbyte.data.formats.conversation import checked_messages
from halfbyte.data.formats.format import Origin
from halfbyte.data.formats.history import after, read_history
from halfbyte.data.table import Cells


@dataclass(frozen=True)
class Instructions:
    """Rows of texts; a part that a row lacks is empty."""

    columns: Columns
    merge_turns: bool = False
    name: str = "instruction"

    @property
    def reason(self) -> dict[str, str]:
        return self.columns.reason

    def by_role(self) -> dict[str, str]:
        return self.columns.by_role()

    def example(self, cells: Cells, row: int, origin: Origin) -> Example:
        columns = self.columns
        answer = Message("assistant", _text(cells, columns.output))
        system = _text(cells, columns.system)
        example = Example(
            row,
            (Message("system", system), answer) if system else (answer,),
            instruction=_text(cells, columns.instruction),
            input=_text(cells, columns.input),
            source=origin.number,
        )
        if columns.history is None:
            return example
        earlier = read_history(cells.get(columns.history), columns.history, typed=origin.typed)
        if not earlier:
            return example
        whole = after(earlier, example)
        checked = checked_messages(whole.messages, origin, merge_turns=self.merge_turns)
        return replace(whole, messages=checked)


def _text(cells: Cells, column: str | None) -> str:
    if column is None:
        return ""
    value = cells.get(column)
    return value if isinstance(value, str) else text_of(value, column)
