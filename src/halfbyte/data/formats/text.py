"""Plain texts, for a model that goes on with its pre-training."""

from __future__ import annotations

from dataclasses import dataclass, field

from halfbyte.data.example import Example
from halfbyte.data.formats.cells import text_of
from halfbyte.data.formats.format import Origin
from halfbyte.data.table import Cells


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
