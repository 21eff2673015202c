"""How a run came about: the processes that worked on it, the gaps between them, the machines."""

from __future__ import annotations

from halfbyte.events.types import Changed
from halfbyte.report import figures
from halfbyte.report.blocks import Block, Heading, Items, Paragraph, Table
from halfbyte.report.story import Process, Story


def parts(story: Story) -> list[Block]:
    """A table of the processes of a run, and what was changed between them.

    A run that one process did from its beginning to its end has a sentence.
    """
    saved = _saved(story)
    if len(story.processes) < 2:
        text = "One process did all of it, without an interruption."
        return [Paragraph(text if story.finished else "One process worked on it so far."), *saved]
    marks = list(dict.fromkeys(p.started.machine for p in story.processes))
    rows = []
    before: Process | None = None
    for number, process in enumerate(story.processes, 1):
        gap = "" if before is None else figures.duration(max(0.0, process.begin - before.end))
        start = process.started.resumed_from or 0
        if process.last_step > start:
            steps = f"{figures.count(start + 1)} to {figures.count(process.last_step)}"
        else:
            steps = "none"
        rows.append(
            (
                str(number),
                f"{marks.index(process.started.machine) + 1}: {process.device or 'not recorded'}",
                figures.moment(process.begin),
                gap,
                steps,
                process.ended,
            )
        )
        before = process
    blocks: list[Block] = [
        Table(("part", "machine", "began", "after a gap of", "steps", "ended"), rows, "rllrll")
    ]
    if story.repeated_steps:
        blocks.append(
            Paragraph(
                f"{figures.many(story.repeated_steps, 'step')} that came after the last checkpoint "
                "of a part were done again by the next one, and count once."
            )
        )
    return [*blocks, *saved, *_changed(story.changed)]


def _saved(story: Story) -> list[Block]:
    """What writing checkpoints took, and how much of it the steps had to wait for."""
    if not story.checkpoints or not any(c.seconds for c in story.checkpoints):
        return []
    beside = sum(c.seconds for c in story.checkpoints)
    still = sum(c.stood_still for c in story.checkpoints)
    steps = sum(s.seconds for s in story.steps)
    share = f", {still / steps:.1%} of the time of all steps" if steps else ""
    return [
        Paragraph(
            f"{figures.many(len(story.checkpoints), 'checkpoint')} took {beside:.2f} s to write "
            f"beside the steps, which stood still for them for {still:.2f} s{share}."
        )
    ]


def _changed(changed: list[Changed]) -> list[Block]:
    if not changed:
        return []
    texts = [f"{c.key}: {c.before} before, {c.now} from there on" for c in changed]
    return [Heading("Settings that were changed, as somebody allowed by name"), Items(texts)]
