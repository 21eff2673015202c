"""What batches, steps and epochs count: rows, or packs of rows."""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.data.packing import Packs
from halfbyte.plan.strategy import ROWS_PER_STEP


@dataclass(frozen=True)
class Units:
    """``rows`` that train, and the ``packs`` that they are put into, if they are."""

    rows: int
    packs: Packs | None = None

    @property
    def count(self) -> int:
        """Of an epoch."""
        return self.rows if self.packs is None else self.packs.count

    @property
    def words(self) -> str:
        return "rows" if self.packs is None else "packs"

    @property
    def rows_each(self) -> float:
        """The mean."""
        return self.rows / max(1, self.count)

    @property
    def wanted_per_step(self) -> int:
        """As many as hold about 16 rows, where the recipe leaves it open."""
        return max(1, round(ROWS_PER_STEP / self.rows_each)) if self.rows else ROWS_PER_STEP
