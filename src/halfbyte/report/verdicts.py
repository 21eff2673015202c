"""What the report vouches for: each verdict is computed from the records and able to fail."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from halfbyte.report import figures
from halfbyte.report.story import Story, counts

# LoRA at usual ranks trains a few per cent of a small model and less of a large one; more than
# this share means that something other than an adapter was trained.
LARGEST_SHARE = 0.05


@dataclass(frozen=True)
class Verdict:
    """``passed`` is None where the run has nothing to judge by; ``detail`` says why."""

    name: str
    passed: bool | None
    detail: str

    @property
    def word(self) -> str:
        return {True: "passed", False: "failed", None: "not applicable"}[self.passed]


@dataclass(frozen=True)
class EpochMean:
    """Mean training loss of one whole pass over the rows."""

    epoch: int  # from 1
    loss: float  # over the labelled tokens of its steps, each measured before its own update
    first: int  # step
    last: int


def verdicts(story: Story) -> list[Verdict]:
    """All of them, in the order in which the report shows them."""
    return [
        _all_steps(story),
        _finite(story),
        _share(story),
        _epochs(story),
        _fell(story),
        _below(story, "quantized base"),
        _below(story, "base"),
        _kept_is_best(story),
        *_checks(story),
    ]


def epoch_means(story: Story) -> list[EpochMean]:
    """The mean loss of each pass that was made whole."""
    length = story.plan.steps_per_epoch if story.plan else 0
    means: list[EpochMean] = []
    while length:
        first, last = len(means) * length + 1, (len(means) + 1) * length
        steps = [s for s in story.steps if first <= s.step <= last]
        counted = [s for s in steps if counts(s)]
        labels = sum(s.labels for s in counted)
        if len(steps) < length or not labels:
            break
        mean = sum(s.loss * s.labels for s in counted) / labels
        means.append(EpochMean(len(means) + 1, mean, first, last))
    return means


def _all_steps(story: Story) -> Verdict:
    done, planned = story.last_step, story.planned_steps
    early = story.stopped_early
    last = planned if early is None else early.step
    gaps = last - len(story.steps)
    ended = "finished early, as its recipe says" if early is not None else "finished"
    return Verdict(
        "every planned step was done and the run finished",
        story.finished is not None and done == last and gaps == 0 and last > 0,
        f"{figures.count(len(story.steps))} of {figures.many(planned, 'step')} recorded; the run "
        + (ended if story.finished else "did not finish"),
    )


def _finite(story: Story) -> Verdict:
    name = "the loss of every step is a finite number, and no update was left out"
    if not story.steps:
        return Verdict(name, None, "no step was made")
    # With loss scaling (fp16) a skipped update is how the scale is found, and no fault.
    scaled = story.plan is not None and story.plan.precision == "fp16"
    stopped_at = story.diverged.step if story.diverged else None
    bad = [
        s.step
        for s in story.steps
        if s.step == stopped_at
        or (not s.left_out and (not scaled if s.skipped else not math.isfinite(s.loss)))
    ]
    left_out = sum(s.left_out for s in story.steps)
    skipped = sum(s.skipped for s in story.steps) - left_out
    detail = (
        f"not so at {_some_steps(bad)}" if bad else f"all {figures.many(len(story.steps), 'step')}"
    )
    if scaled and skipped:
        detail += f"; {figures.many(skipped, 'update')} left out while the loss scale was found"
    if left_out:
        detail += f"; {figures.many(left_out, 'batch', 'batches')} left out, as the recipe says"
    return Verdict(name, not bad, detail)


def _share(story: Story) -> Verdict:
    name = f"at most {LARGEST_SHARE:.0%} of the parameters were trained".replace("%", " %")
    if story.model is None:
        return Verdict(name, None, "the model was not recorded")
    trained = story.model.parameters_trainable
    total = trained + story.model.parameters_base
    return Verdict(
        name,
        0 < trained <= LARGEST_SHARE * total,
        f"{figures.count(trained)} of {figures.count(total)}: {figures.percentage(trained, total)}",
    )


def _epochs(story: Story) -> Verdict:
    name = "the mean training loss of each epoch is below that of the one before"
    means = epoch_means(story)
    if len(means) < 2:
        made = figures.many(len(means), "whole pass", "whole passes")
        return Verdict(name, None, f"{made} over the rows, and it takes two to compare")
    falls = all(b.loss < a.loss for a, b in pairwise(means))
    return Verdict(name, falls, " → ".join(figures.loss(m.loss) for m in means))


def _fell(story: Story) -> Verdict:
    window = story.recipe.training.logging_steps
    steps = figures.many(window, "step")
    name = f"the training loss ended lower than it began (means of {steps})"
    if story.last_step < 2 * window:
        return Verdict(
            name, None, f"{figures.many(story.last_step, 'step')} are too few to compare"
        )
    first, last = story.windowed_loss(window), story.windowed_loss(story.last_step)
    if first is None or last is None:
        return Verdict(name, None, "the record lacks the steps to compare")
    return Verdict(name, last < first, f"{figures.loss(first)} → {figures.loss(last)}")


def _below(story: Story, what: str) -> Verdict:
    name = f"the adapter's held-out loss is below the {what}'s"
    other = story.base if what == "base" else story.quantized_base
    loss = story.adapter_loss
    if other is None or loss is None:
        who = f"the {what}" if other is None else "the adapter"
        return Verdict(name, None, f"{who} was not measured on held-out rows")
    return Verdict(
        name,
        loss < other.loss,
        f"{figures.loss(loss)} against {figures.loss(other.loss)}, "
        f"a difference of {figures.difference(loss - other.loss)}",
    )


def _kept_is_best(story: Story) -> Verdict:
    name = "the adapter that is kept has the lowest held-out loss that was measured"
    if story.kept is None or story.adapter_loss is None:
        who = "no adapter was kept" if story.kept is None else "the kept adapter was not measured"
        return Verdict(name, None, who)
    best = min([e.loss for e in story.evaluations if math.isfinite(e.loss)], default=math.nan)
    at = [e.step for e in story.evaluations if e.loss == best]
    detail = f"step {figures.count(story.kept.step)}: {figures.loss(story.adapter_loss)}"
    if story.adapter_loss <= best:
        return Verdict(name, True, f"{detail}, the lowest of {len(story.evaluations)}")
    return Verdict(name, False, f"{detail}; step {at[0] if at else '?'}: {figures.loss(best)}")


def _checks(story: Story) -> list[Verdict]:
    if story.checks:
        return [Verdict(c.name, c.passed, c.detail) for c in story.checks]
    name = "the saved adapter read again gives the same logits"
    return [Verdict(name, None, "no adapter has been saved")]


def _some_steps(steps: list[int]) -> str:
    shown = ", ".join(figures.count(s) for s in steps[:5])
    return f"step{'s' if len(steps) > 1 else ''} {shown}" + (
        f" and {len(steps) - 5} more" if len(steps) > 5 else ""
    )
