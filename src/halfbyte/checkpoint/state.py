"""What a checkpoint holds beside its tensors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

TEXTS, COUNTS = ("run_id", "device"), ("step", "skipped")
LOSSES = ("held_out_loss", "best_loss")


@dataclass(frozen=True)
class CheckpointState:
    """Where a run stands after ``step`` finished optimizer steps.

    The batch of a step, the place of each row in a pack and the dropout masks are functions of the
    recipe's seed and the step, and nothing in a step draws from a generator: so the step is the
    position in the data and the state of everything random.
    """

    run_id: str  # drawn when the run began
    step: int
    held_out_loss: float | None  # at this step, where it was measured
    best_step: int | None  # the step with the lowest held-out loss so far
    best_loss: float | None
    versions: dict[str, str]
    device: str
    hashes: dict[str, str]  # SHA-256 of rows, data files and the base model's files, by what it is
    skipped: int = 0  # of the finished steps, those that made no update
    interventions: list[dict[str, Any]] = field(default_factory=list)  # rolled back, rates lowered
    watching: dict[str, Any] = field(default_factory=dict)  # what run/reacting.py keeps of the past

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def of_plain(cls, raw: Any) -> CheckpointState:
        """The state that ``plain`` gave; raises ValueError for anything else."""
        if not isinstance(raw, dict):
            raise ValueError("it is no group of values")
        unknown = sorted(map(str, raw.keys() - {f.name for f in fields(cls)}))
        if unknown:
            raise ValueError(f"it holds {unknown[0]}, which this version does not know")
        for name in TEXTS:
            _require(isinstance(raw.get(name), str), name)
        for name in COUNTS:
            _require(_is_count(raw.get(name, 0)), name)
        _require(raw.get("best_step") is None or _is_count(raw["best_step"]), "best_step")
        for name in LOSSES:
            _require(raw.get(name) is None or _is_finite(raw[name]), name)
        for name in ("versions", "hashes"):
            texts = raw.get(name)
            _require(
                isinstance(texts, dict)
                and all(isinstance(value, str) for pair in texts.items() for value in pair),
                name,
            )
        listed = raw.get("interventions", [])
        _require(isinstance(listed, list) and all(isinstance(i, dict) for i in listed), "steps")
        _require(isinstance(raw.get("watching", {}), dict), "watching")
        try:
            return cls(**raw)
        except TypeError as error:
            raise ValueError(str(error)) from None


def _require(holds: bool, name: str) -> None:
    if not holds:
        raise ValueError(f"its {name} is not what a checkpoint holds")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
