"""A step whose update is left out, told apart from training that cannot go on.

A step whose gradient norm is not finite makes no update; that is decided on the device. Under
loss scaling it is how the scale is found, elsewhere it may happen once in a long while. A loss
that is not finite is another matter: no scale is too large for it, so outside fp16 it ends the
run at once, and in fp16 when a scale of 1 has not helped. Neither may go on for long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from halfbyte.engine.scaler import LossScaler
from halfbyte.events.types import Noticed
from halfbyte.loop.steps import FinishedStep

# Halving so often brings a loss scale of 2^16 to 1 and leaves four steps to show that it helped.
SKIPS_IN_A_ROW = 20
ROWS_NAMED = 8


class SkippedSteps:
    """Counts the steps that made no update and says when there is no going on.

    ``name_rows`` says of which rows a step was, in words.
    """

    def __init__(self, scaler: LossScaler, name_rows: Callable[[FinishedStep], str]) -> None:
        self.scaler = scaler
        self.name_rows = name_rows
        self.count = 0  # since step 1, in earlier processes as well
        self.in_a_row = 0

    @property
    def exhausted(self) -> bool:
        """Whether so many steps in a row made no update that the run must end."""
        return self.in_a_row >= SKIPS_IN_A_ROW

    def pass_over(self) -> None:
        """Count a step that was not made at all, as its batch is left out."""
        self.count += 1

    def forgive(self) -> None:
        """The last step's batch is left out from now on: it counts as one that was not made."""
        self.in_a_row -= 1

    def note(self, step: FinishedStep) -> str | None:
        """Count ``step``, which has been read; returns why training cannot go on, or None."""
        self.in_a_row = 0 if step.updated else self.in_a_row + 1
        self.count += not step.updated
        # The scale is waited for only here: most steps never ask for it.
        if not math.isfinite(step.loss) and (
            not self.scaler.enabled or step.updated or self.scaler.scale.item() <= 1.0
        ):
            what = f"the loss of step {step.number:,} is {_word(step.loss)}"
            return f"{what} on {self.name_rows(step)}"
        if self.exhausted:
            return (
                f"the gradient of step {step.number:,}, of {self.name_rows(step)}, is the "
                f"{self.in_a_row}th in a row that is not finite"
            )
        return None


def sentence(reason: str, checkpoint: str | None, *, updated: bool, scaled: bool) -> str:
    """What is wrong, what to go back to, and what may help.

    ``updated`` says whether the step that ``reason`` names changed the weights, ``scaled``
    whether its loss was scaled for fp16.
    """
    left = "" if updated else " without that update"
    last = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint"
    todo = "start again with a lower training.learning_rate" + (" or in fp32" if scaled else "")
    if not updated:
        todo = f"look at these rows, or {todo}"
    return f"{reason}, so training stopped{left}; {last}; {todo}."


def stop_sentence(noticed: Noticed, limit: str, checkpoint: str | None) -> str:
    """The same for what was noticed while everything was finite; ``limit`` says why the run went
    back no more, where that ended it."""
    last = f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint"
    why = f", and {limit}, so training stopped" if limit else ", so training stopped"
    says = "" if limit else f", as watch.{noticed.name} says"
    return f"{noticed.text}{why}{says}; {last}; {noticed.todo}."


def named_rows(rows: Sequence[int], sources: Sequence[int] = (), paths: Sequence[str] = ()) -> str:
    """``rows 3, 8 and 12``, as the report counts them, the first few of many.

    With the number of each row's source and all sources' ``paths``: ``rows 3 and 8 of a.jsonl and
    row 12 of b.jsonl``.
    """
    placed = sorted(zip(sources or [0] * len(rows), rows, strict=True))
    shown: dict[int, list[str]] = {}
    for source, row in placed[:ROWS_NAMED]:
        shown.setdefault(source, []).append(f"{row + 1:,}")
    more = len(placed) - ROWS_NAMED
    if len(shown) == 1 and more > 0:
        [(source, numbers)] = shown.items()
        return f"{_numbered([*numbers, f'{more:,} more'])}{_of(source, paths)}"
    parts = [_numbered(numbers) + _of(source, paths) for source, numbers in shown.items()]
    return _listed([*parts, f"{more:,} more"] if more > 0 else parts)


def _numbered(numbers: list[str]) -> str:
    return f"row{'s' if len(numbers) > 1 else ''} {_listed(numbers)}"


def _of(source: int, paths: Sequence[str]) -> str:
    if not paths:
        return ""
    which = f" (source {source + 1})" if paths.count(paths[source]) > 1 else ""
    return f" of {paths[source]}{which}"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _word(loss: float) -> str:
    return "NaN" if math.isnan(loss) else "infinite"
