"""A step whose loss is far above those of the steps before it.

Losses fall, and they scatter with the rows of each step, often with a long tail upwards. Each loss
is therefore measured from the median of the few steps before it, which follows the fall, and its
distance is compared with the distances of a hundred earlier steps: with their spread, by the median
of deviations or by the highest tenth, whichever is larger, and with the highest of them. A few
spikes among these steps do not move the spread; they are the highest, though, so that rows which
come up like that again and again, such as those of a rare source, are told of once.
docs/watching.md says how often these bounds are met by chance.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

MEDIAN_STEPS = 15  # the median of so many losses is what the next is measured from
FEWEST_LOSSES = 5  # or of so many, in the first steps
SPREAD_STEPS = 100  # the spread is that of so many distances
FEWEST_DISTANCES = 15  # or of so many: a spike is found from step 21 on
SPREADS = 8.0  # a spike is so many spreads above their middle …
SPREADS_ABOVE_HIGHEST = 4.0  # … and so many above the highest of them
# Where all losses are nearly the same, differences of a few hundredths are no spikes.
LEAST_SPREAD = 0.05  # of the median loss
# Standard deviations of a normal distribution in its median deviation, and at its highest tenth.
NORMAL_DEVIATION, NORMAL_TENTH = 1.4826, 1.2816


@dataclass(frozen=True)
class Spike:
    """What the loss was expected at: ``usual`` plus or minus ``spread``, in nats per token."""

    usual: float
    spread: float


class LossSpikes:
    """Takes the loss of each step in turn."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=MEDIAN_STEPS)
        self._distances: deque[float] = deque(maxlen=SPREAD_STEPS)

    def take(self, loss: float) -> Spike | None:
        """Count ``loss``, a finite number; returns what it was expected at if it is a spike."""
        spike = None
        if len(self._losses) >= FEWEST_LOSSES:
            usual = median(self._losses)
            if len(self._distances) >= FEWEST_DISTANCES:
                spike = self._judge(loss - usual, usual)
            self._distances.append(loss - usual)
        self._losses.append(loss)
        return spike

    def _judge(self, distance: float, usual: float) -> Spike | None:
        known = sorted(self._distances)
        middle = median(known)
        deviation = median(abs(value - middle) for value in known)
        spread = max(
            deviation * NORMAL_DEVIATION,
            (known[int(0.9 * (len(known) - 1))] - middle) / NORMAL_TENTH,
            LEAST_SPREAD * abs(usual),
        )
        bound = max(middle + SPREADS * spread, known[-1] + SPREADS_ABOVE_HIGHEST * spread)
        return Spike(usual + middle, spread) if distance > bound else None

    def state(self) -> dict[str, Any]:
        """What ``load_state`` takes, as JSON has it."""
        return {"losses": list(self._losses), "distances": list(self._distances)}

    def load_state(self, state: dict[str, Any]) -> None:
        self._losses = deque(map(float, state["losses"]), MEDIAN_STEPS)
        self._distances = deque(map(float, state["distances"]), SPREAD_STEPS)
