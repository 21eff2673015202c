"""The loop: steps in order, and what happens between them given as callables."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from halfbyte.data.batch import Batch
from halfbyte.engine.step import StepResult


@dataclass(frozen=True)
class FinishedStep:
    """A step whose values have been read back."""

    number: int
    loss: float
    grad_norm: float
    updated: bool
    tokens: int
    labels: int
    seconds: float


def run_steps(
    step: Callable[[int, Sequence[Batch]], StepResult],
    batches: Callable[[int], list[Batch]],
    *,
    first: int,
    last: int,
    after: Sequence[Callable[[FinishedStep], None]],
    stop: Callable[[], bool],
) -> int:
    """Run steps ``first`` … ``last``; returns the last one finished.

    ``batches(n)`` gives the micro-batches of step n. After each step every callable of ``after``
    is called with its values, in order; then ``stop()`` is asked whether to end here.
    """
    for number in range(first, last + 1):
        began = time.perf_counter()
        micro_batches = batches(number)
        result = step(number, micro_batches)
        finished = FinishedStep(
            number=number,
            loss=result.loss.item(),
            grad_norm=result.grad_norm.item(),
            updated=bool(result.updated.item()),
            tokens=sum(batch.num_tokens for batch in micro_batches),
            labels=sum(batch.num_labels for batch in micro_batches),
            seconds=time.perf_counter() - began,
        )
        for call in after:
            call(finished)
        if stop():
            return number
    return last
