"""What a run that nobody looks at should tell: losses and gradients that are not as they should be.

Each step that was read and each held-out loss is given to :class:`Noticing`, which returns what
it noticed, with what the recipe says to do about it. It keeps no more of the past than it needs,
and gives that as plain values, so that a run that goes on notices what it would have noticed.
docs/watching.md has the bounds in a table.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from halfbyte.events.types import Noticed
from halfbyte.loop.steps import FinishedStep
from halfbyte.recipe.watch_schema import WatchRecipe
from halfbyte.watching.spikes import LossSpikes

QUIET_STEPS = 50  # after a spike, or a loss of 0, so many steps tell of no other
CLIPPED_STEPS = 100  # in a row
# No learning is judged at the end of each span of at least so many steps and rows, by the means of
# its last third and of the first third of the first: of fewer rows the means scatter too much.
SPAN_STEPS, SPAN_ROWS = 60, 500
# Overfitting: so many evaluations in a row, each above the one before, and the last above the
# lowest by more than this share. The held-out rows are always the same, so chance moves it less.
RISES, RISE = 2, 0.01


def span_of(rows_in_step: float, warmup_steps: int) -> int:
    """Steps after which ``no_learning`` is judged; the rate has risen in its first third."""
    return max(SPAN_STEPS, math.ceil(SPAN_ROWS / rows_in_step), 3 * warmup_steps)


@dataclass
class _Mean:
    """A mean of losses as they come."""

    total: float = 0.0
    count: int = 0

    def take(self, loss: float) -> None:
        self.total += loss
        self.count += 1

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None

    @classmethod
    def of_plain(cls, raw: dict[str, Any]) -> _Mean:
        return cls(float(raw["total"]), int(raw["count"]))


@dataclass
class _Lowest:
    """The evaluation with the lowest held-out loss, and what came after it."""

    step: int
    loss: float
    train: float | None  # mean training loss of the steps since the evaluation before it
    last: float  # held-out loss of the last evaluation
    rises: int = 0  # in a row
    told: bool = False

    @classmethod
    def of_plain(cls, raw: dict[str, Any]) -> _Lowest:
        train = None if raw["train"] is None else float(raw["train"])
        loss, last = float(raw["loss"]), float(raw["last"])
        return cls(int(raw["step"]), loss, train, last, int(raw["rises"]), bool(raw["told"]))


class Noticing:
    """The detectors of one run.

    ``clip`` is where gradients are clipped (0: nowhere), ``span`` is ``span_of``'s, and
    ``name_rows`` says of which rows a step was, in words.
    """

    def __init__(
        self,
        recipe: WatchRecipe,
        *,
        clip: float,
        span: int,
        scaled: bool,
        name_rows: Callable[[FinishedStep], str],
    ) -> None:
        self.recipe, self.clip, self.span, self.scaled = recipe, clip, span, scaled
        self.name_rows = name_rows
        self._spikes = LossSpikes()
        self._quiet: dict[str, int] = {}  # name: the last step that tells of no other
        self._clipped = 0  # steps in a row
        self._first = _Mean()  # of the losses of the first third of a span
        self._recent: deque[float] = deque(maxlen=span // 3)
        self._since = _Mean()  # of the losses since the last evaluation
        self._lowest: _Lowest | None = None

    def step(self, step: FinishedStep, not_finite: str | None = None) -> list[Noticed]:
        """What is to be told of ``step``; ``not_finite`` is why training cannot go on, if so."""
        if not_finite is not None:
            return [self._not_finite(step, not_finite)]
        if not step.updated and not self.scaled:
            return [self._gradient(step)]
        if not math.isfinite(step.loss):
            return []
        found = [self._zero(step), self._spike(step), self._clip(step), self._learning(step)]
        self._since.take(step.loss)
        return [one for one in found if one is not None]

    def evaluation(self, step: int, loss: float) -> list[Noticed]:
        """What is to be told of the held-out ``loss`` of the adapter after ``step``."""
        train, self._since = self._since.value, _Mean()
        lowest = self._lowest
        if not math.isfinite(loss):
            return []
        if lowest is None or loss < lowest.loss:
            self._lowest = _Lowest(step, loss, train, loss)
            return []
        lowest.rises = lowest.rises + 1 if loss > lowest.last else 0
        lowest.last = loss
        enough = lowest.rises >= RISES and loss > lowest.loss * (1 + RISE)
        if lowest.told or not enough or train is None or lowest.train is None:
            return []
        if train >= lowest.train:
            return []
        lowest.told = True
        return [
            self._noticed(
                "overfitting",
                "warning",
                step,
                f"the held-out loss has risen from {lowest.loss:.4f} after step {lowest.step:,} "
                f"to {loss:.4f}, while the training loss fell from {lowest.train:.4f} to "
                f"{train:.4f}: the adapter learns its rows by heart",
                "fewer epochs, more rows or evaluation.early_stopping end such a run in time",
            )
        ]

    def _not_finite(self, step: FinishedStep, reason: str) -> Noticed:
        name = "gradient_not_finite" if math.isfinite(step.loss) else "loss_not_finite"
        todo = "look at these rows, or lower training.learning_rate"
        return self._noticed(name, "error", step.number, reason, todo, step.rows)

    def _gradient(self, step: FinishedStep) -> Noticed:
        return self._noticed(
            "gradient_not_finite",
            "warning",
            step.number,
            f"the gradient of step {step.number:,}, of {self.name_rows(step)}, is not finite, so "
            "no update was made",
            "where it happens often, look at these rows or lower training.learning_rate",
            step.rows,
        )

    def _zero(self, step: FinishedStep) -> Noticed | None:
        if step.loss != 0.0 or not self._may_tell("loss_zero", step.number):
            return None
        if step.labels == 0:
            why, todo = "as none of its tokens is learned", "see what is learned with halfbyte data"
        elif self.scaled:
            why = "so nothing was learned: it may be too small a number for fp16"
            todo = "train with precision fp32 or bf16"
        else:
            why = "so nothing was learned"
            todo = "see with halfbyte data what of these rows is learned"
        text = f"the loss of step {step.number:,} is exactly 0 on {self.name_rows(step)}, {why}"
        return self._noticed("loss_zero", "warning", step.number, text, todo, step.rows)

    def _spike(self, step: FinishedStep) -> Noticed | None:
        spike = self._spikes.take(step.loss)
        if spike is None or not self._may_tell("loss_spike", step.number):
            return None
        return self._noticed(
            "loss_spike",
            "warning",
            step.number,
            f"the loss of step {step.number:,} is {step.loss:.3f} on {self.name_rows(step)}, where "
            f"{spike.usual:.3f} ± {spike.spread:.3f} was usual",
            "look at these rows; where it happens often, lower training.learning_rate, or let "
            "watch.loss_spike leave such batches out",
            step.rows,
        )

    def _clip(self, step: FinishedStep) -> Noticed | None:
        if not step.updated:
            return None
        self._clipped = self._clipped + 1 if 0 < self.clip <= step.grad_norm else 0
        if self._clipped != CLIPPED_STEPS or not self._may_tell("gradient_clipped", step.number):
            return None
        return self._noticed(
            "gradient_clipped",
            "note",
            step.number,
            f"the gradient's norm was at {self.clip:g}, where it is clipped, or above for "
            f"{CLIPPED_STEPS} steps in a row",
            "no harm is done while the loss falls; else lower training.learning_rate or raise "
            "training.max_grad_norm",
        )

    def _learning(self, step: FinishedStep) -> Noticed | None:
        third = self.span // 3
        if self._first.count < third:
            self._first.take(step.loss)
        self._recent.append(step.loss)
        before = self._first.value
        if step.number % self.span or len(self._recent) < third or before is None:
            return None
        now = fmean(self._recent)
        if now < before or not self._may_tell("no_learning", step.number):
            return None
        return self._noticed(
            "no_learning",
            "warning",
            step.number,
            f"the training loss has not fallen: {before:.4f} on average over the first {third:,} "
            f"steps, {now:.4f} over the last {third:,} up to step {step.number:,}",
            "see with halfbyte data what is learned, and try another training.learning_rate",
        )

    def _may_tell(self, name: str, step: int) -> bool:
        """Whether ``name`` is told of after ``step``; spikes and zeros again after a while."""
        if step <= self._quiet.get(name, 0):
            return False
        again = name in ("loss_spike", "loss_zero")
        self._quiet[name] = step + QUIET_STEPS if again else 2**31
        return True

    def _noticed(
        self,
        name: str,
        severity: str,
        step: int,
        text: str,
        todo: str,
        rows: Sequence[int] = (),
    ) -> Noticed:
        action = str(getattr(self.recipe, name))
        return Noticed(name, severity, step, text, todo, action, list(rows))

    def state(self) -> dict[str, Any]:
        """What ``load_state`` takes, as JSON has it; it raises what anything else leads to."""
        return {
            "spikes": self._spikes.state(),
            "quiet": dict(self._quiet),
            "clipped": self._clipped,
            "first": asdict(self._first),
            "recent": list(self._recent),
            "since": asdict(self._since),
            "lowest": None if self._lowest is None else asdict(self._lowest),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._spikes.load_state(state["spikes"])
        self._quiet = {str(name): int(step) for name, step in state["quiet"].items()}
        self._clipped = int(state["clipped"])
        self._first = _Mean.of_plain(state["first"])
        self._recent = deque(map(float, state["recent"]), self.span // 3)
        self._since = _Mean.of_plain(state["since"])
        lowest = state["lowest"]
        self._lowest = None if lowest is None else _Lowest.of_plain(lowest)
