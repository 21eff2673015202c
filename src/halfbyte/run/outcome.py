"""A run as Python sees it after ``train``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.events import read_events
from halfbyte.events.types import Evaluated

if TYPE_CHECKING:
    from halfbyte.report.done_steps import DoneSteps


@dataclass(frozen=True)
class Run:
    """What ``train`` returns; everything else is in ``folder``."""

    folder: Path
    interrupted: bool
    step: int  # the last one finished
    signal: str = ""  # that interrupted it

    @classmethod
    def make(cls, folder: Path, *, interrupted: bool, signal: str = "") -> Run:
        """Write the report of ``folder`` and describe it."""
        from halfbyte.report import make_report
        from halfbyte.report.sbom import write_if_asked

        write_if_asked(folder)
        make_report(folder)
        steps = [step.step for step in _done(folder).steps]
        return cls(folder, interrupted, max(steps, default=0), signal)

    @property
    def finished(self) -> bool:
        return not self.interrupted

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def losses(self) -> list[tuple[int, float]]:
        """Training loss by step; one done twice counts as done last, one passed over has none."""
        return [(step.step, step.loss) for step in _done(self.folder).steps if not step.left_out]

    def held_out(self) -> dict[str, list[tuple[int, float]]]:
        """Held-out losses as (step, loss) by what was measured: base, quantized base, adapter."""
        found: dict[str, list[tuple[int, float]]] = {}
        for record in read_events(self.folder):
            if isinstance(record.event, Evaluated):
                found.setdefault(record.event.what, []).append(
                    (record.event.step, record.event.loss)
                )
        return found


def _done(folder: Path) -> DoneSteps:
    from halfbyte.report.done_steps import DoneSteps

    done = DoneSteps()
    for record in read_events(folder):
        done.take(record.event)
    return done
