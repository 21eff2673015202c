"""Plain texts, for a model that goes on with its pre-training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from halfbyte.data.example import Example
from halfbyte.data.formats.cells import text_of
from halfbyte.data.formats.format import Origin
from halfbyte.data.table import Cells

# What a conversation that was rendered already looks like; of a pair both must stand there.
_MARKS = (
    ("<|im_start|>",),
    ("<|start_header_id|>",),
    ("<start_of_turn>",),
    ("[INST]", "[/INST]"),
    ("<|user|>", "<|assistant|>"),
    ("### Instruction:", "### Response:"),
    ("### Human:", "### Assistant:"),
    ("\nHuman:", "\nAssistant:"),
    ("USER:", "ASSISTANT:"),
)
_ANY_MARK = re.compile("|".join(re.escape(marks[0]) for marks in _MARKS))


@dataclass(frozen=True)
class Texts:
    """Rows of one text each, of which every token is learned."""

    column: str
    reason: dict[str, str] = field(default_factory=dict)
    name: str = "text"

    def by_role(self) -> dict[str, str]:
        return {"text": self.column}

    def example(self, cells: Cells, row: int, origin: Origin) -> Example:
        value = cells.get(self.column)
        text = value if isinstance(value, str) else text_of(value, self.column)
        return Example(row, text=text, source=origin.number)


def rendered_marks(texts: Sequence[str]) -> str | None:
    """The marks of a rendered conversation, where at least half of ``texts`` hold them."""
    for marks in _MARKS:
        holding = sum(
            all(mark in text for mark in marks) for text in texts if _ANY_MARK.search(text)
        )
        if texts and 2 * holding >= len(texts):
            return " and ".join(mark.strip() for mark in marks)
    return None
