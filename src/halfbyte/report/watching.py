"""What was noticed while the steps ran, and what was done about it."""

from __future__ import annotations

from itertools import groupby

from halfbyte.events.types import Noticed
from halfbyte.report import figures
from halfbyte.report.blocks import Block, Finding, Findings, Heading, Paragraph
from halfbyte.report.story import Story

# Of one kind, such as spikes, so many are shown.
SHOWN = 5


def watching(story: Story) -> list[Block]:
    """The part on watching; nothing in records of before there was any."""
    if story.plan is None or not story.plan.watched:
        return []
    blocks: list[Block] = [Heading("Watching")]
    if not story.noticed:
        held_out = " and every held-out loss" if story.evaluations else ""
        watched = f"The loss and the gradient of every step{held_out} were watched while it ran"
        blocks.append(Paragraph(f"{watched}; nothing was noticed."))
    else:
        by_kind = sorted(story.noticed, key=lambda e: e.name)
        kinds = [list(group) for _, group in groupby(by_kind, key=lambda e: e.name)]
        kinds.sort(key=lambda kind: kind[0].step)
        blocks.append(Findings([_shown(story, e) for kind in kinds for e in kind[:SHOWN]]))
        more = [
            f"{figures.count(len(kind) - SHOWN)} more of {kind[0].name}, the last at step "
            f"{figures.count(kind[-1].step)}"
            for kind in kinds
            if len(kind) > SHOWN
        ]
        if more:
            blocks.append(Paragraph(f"Not shown: {'; '.join(more)}."))
    if story.stopped_early is not None:
        blocks.append(Paragraph(early_stop(story)))
    return blocks


def early_stop(story: Story) -> str:
    """Why the run ended before its last step, in a sentence."""
    early = story.stopped_early
    assert early is not None
    times = figures.many(early.patience, "evaluation")
    lowest = ""
    if early.best_loss is not None and early.best_step is not None:
        lowest = (
            f", the lowest having been {figures.loss(early.best_loss)} after step "
            f"{figures.count(early.best_step)}"
        )
    return (
        f"The steps ended early, after {figures.count(early.step)} of "
        f"{figures.count(story.planned_steps)}: {times} in a row brought no new lowest held-out "
        f"loss{lowest}, which is where evaluation.early_stopping ends a run."
    )


def _shown(story: Story, noticed: Noticed) -> Finding:
    done = _done(story, noticed)
    return Finding(
        severity=noticed.severity,
        name=noticed.name,
        text=f"{noticed.text[:1].upper()}{noticed.text[1:]}.",
        todo=done or f"{noticed.todo[:1].upper()}{noticed.todo[1:]}.",
        where="",
        examples=[],
    )


def _done(story: Story, noticed: Noticed) -> str:
    """What the run did about it; empty where it only said so."""
    if noticed.action == "stop":
        return f"The run was stopped there, as watch.{noticed.name} says."
    for back in story.rolled_back:
        if back.step == noticed.step and back.why == noticed.name:
            went = "its update was not made"
            if back.to < back.step:
                to = f"step {figures.count(back.to)}" if back.to else "the start"
                went = f"the run went back to {to} and passed over step {figures.count(back.step)}"
            return f"The batch was left out: {went}."
    for lowered in story.rates_lowered:
        if lowered.step == noticed.step and lowered.why == noticed.name:
            return (
                f"The learning rate was multiplied by {lowered.factor:g} from step "
                f"{figures.count(lowered.first)} on."
            )
    return ""
