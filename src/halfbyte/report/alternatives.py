"""What each plot shows, in words, for those who do not see it."""

from __future__ import annotations

import math

from halfbyte.report import figures
from halfbyte.report.story import Story


def loss_alt(story: Story) -> str:
    every = min(story.recipe.training.logging_steps, story.last_step)
    first, last = story.windowed_loss(every), story.windowed_loss(story.last_step)
    text = (
        f"Loss by step, 1 to {figures.count(story.last_step)}: training loss, as logged, from "
        f"{figures.loss(first)} to {figures.loss(last)}"
    )
    if story.evaluations:
        points = story.evaluations
        lowest = min(points, key=lambda e: e.loss)
        text += (
            f"; held-out loss of the adapter measured {figures.many(len(points), 'time')}, lowest "
            f"{figures.loss(lowest.loss)} at step {figures.count(lowest.step)}"
        )
    noticed = sorted({e.step for e in story.noticed})
    if noticed:
        some = ", ".join(figures.count(step) for step in noticed[:5])
        more = f" and {len(noticed) - 5} more" if len(noticed) > 5 else ""
        text += f"; lines mark what was noticed at step{'s' * (len(noticed) > 1)} {some}{more}"
    for what, e in (("base", story.base), ("base in 4 bits", story.quantized_base)):
        if e is not None:
            text += f"; the {what} at {figures.loss(e.loss)}"
    return text + "."


def rate_alt(story: Story) -> str:
    rates = [s.learning_rate for s in story.steps]
    norms = sorted(s.grad_norm for s in story.steps if math.isfinite(s.grad_norm))
    text = f"median {norms[len(norms) // 2]:.3g}, highest {norms[-1]:.3g}" if norms else "no number"
    return (
        f"Learning rate by step, at most {figures.rate(max(rates))} and {figures.rate(rates[-1])} "
        f"at the end; gradient norm by step, {text}."
    )


def speed_alt(story: Story) -> str:
    speeds = sorted(s.tokens / s.seconds for s in story.steps if s.seconds > 0)
    memory = [s.memory_bytes for s in story.steps]
    middle = f"median {figures.count(speeds[len(speeds) // 2])} tokens/s" if speeds else "unknown"
    return (
        f"Speed by step, {middle}; memory in use by step, from {figures.gib(memory[0])} to at most "
        f"{figures.gib(max(memory))}."
    )
