"""What a run does otherwise from some step on: batches left out, and lower learning rates.

It is a plain list, kept with each checkpoint, and all that follows from it is a function of it and
of the step: which steps are passed over, and which rates hold. A run that goes on from a
checkpoint, or back to one, therefore does again what it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Intervention:
    """Either the batch of ``step`` is left out (``factor`` is None), or the rates from the step
    ``first`` on are multiplied by ``factor``, as was decided after ``step``."""

    step: int
    why: str  # the name of what was noticed
    first: int | None = None
    factor: float | None = None


def _of_plain(raw: dict[str, Any]) -> Intervention:
    step, why, first, factor = int(raw["step"]), str(raw["why"]), raw["first"], raw["factor"]
    if first is None and factor is None:
        return Intervention(step, why)
    first, factor = int(first), float(factor)
    if not 0.0 < factor < 1.0:
        raise ValueError(f"a rate is not multiplied by {factor}")
    return Intervention(step, why, first, factor)


class Interventions:
    """All of a run, in the order in which they were decided."""

    def __init__(self, made: Sequence[Intervention] = ()) -> None:
        self.made = list(made)

    @classmethod
    def from_plain(cls, plain: Sequence[dict[str, Any]]) -> Interventions:
        """What ``plain`` gave. Raises KeyError, TypeError or ValueError for anything else."""
        return cls([_of_plain(one) for one in plain])

    def plain(self) -> list[dict[str, Any]]:
        """As JSON has them."""
        return [asdict(one) for one in self.made]

    def leave_out(self, step: int, why: str) -> None:
        self.made.append(Intervention(step, why))

    def lower_rate(self, step: int, why: str, first: int, factor: float) -> None:
        self.made.append(Intervention(step, why, first, factor))

    def go_back_to(self, step: int) -> None:
        """Forget the rates lowered after ``step``: that will be decided again. A batch that is
        left out stays so, wherever the run goes on from."""
        self.made = [one for one in self.made if one.factor is None or one.step <= step]

    def leaves_out(self, step: int) -> bool:
        """Whether ``step`` is passed over: no batch, no update, and the schedule holds."""
        return any(one.factor is None and one.step == step for one in self.made)

    @property
    def left_out(self) -> int:
        """How many batches are left out."""
        return sum(one.factor is None for one in self.made)

    def factors(self, step: int) -> list[float]:
        """What the rates of ``step`` are multiplied by, one after the other."""
        return [
            one.factor
            for one in self.made
            if one.factor is not None and one.first is not None and one.first <= step
        ]

    def rates(self, table: Tensor, step: int) -> Tensor:
        """The rates that hold in ``step``, of a schedule ``table`` fp32 [updates]; a new tensor."""
        table = table.clone()
        for factor in self.factors(step):
            table *= factor
        return table
