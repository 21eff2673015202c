"""Several runs laid over one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.errors import RunError
from halfbyte.report import figures
from halfbyte.report.blocks import Block, Code, Document, Paragraph, Picture, Section, Table
from halfbyte.report.html import to_html
from halfbyte.report.make import write_whole
from halfbyte.report.page_one import state
from halfbyte.report.plots import COLOURS, Plot, draw, finite, prepare, running_mean
from halfbyte.report.story import Story, flatten, read_story
from halfbyte.report.verdicts import verdicts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Settings that are about the document and not about the run.
_WORDS = ("title", "author", "objective", "report.")


def compare_runs(folders: Sequence[Path], out: Path) -> Path:
    """Write a page that lays the runs in ``folders`` over one another, and return its path.

    ``out`` is the HTML file, or a folder in which it becomes ``comparison.html``. The page holds
    the loss curves in one plot, the results side by side, and the settings that differ. Raises
    RunError for fewer than two or too many runs, and where a folder holds none.
    """
    if not 2 <= len(folders) <= len(LETTERS):
        raise RunError(
            f"a comparison takes 2 to {len(LETTERS)} runs and {len(folders)} were named; "
            "name that many run folders."
        )
    stories = [read_story(Path(folder)) for folder in folders]
    path = Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        path = path / "comparison.html"
    drawn = _plot(stories)
    pictures = {} if drawn is None else {"comparison": drawn.svg}
    write_whole(path, to_html(_document(stories, drawn is not None), pictures).encode())
    return path


def _document(stories: list[Story], drawn: bool) -> Document:
    sections = [
        Section("The runs", "runs", [_runs(stories)]),
        Section("Results side by side", "side-by-side", _results(stories)),
    ]
    if drawn:
        sections.append(Section("Loss", "loss", [_picture(stories)]))
    sections.append(Section("Settings that differ", "settings", _differences(stories)))
    return Document(
        title=f"{len(stories)} runs compared",
        kicker="Comparison of fine-tuning runs",
        facts=[story.name for story in stories],
        state="",
        objective="",
        page_one=sections,
        sections=[],
    )


def _runs(stories: list[Story]) -> Table:
    rows = [
        (
            letter,
            Code(story.name),
            story.title,
            figures.NONE if story.begin is None else figures.moment(story.begin),
            state(story),
        )
        for letter, story in zip(LETTERS, stories, strict=False)
    ]
    return Table(("run", "folder", "title", "begun", "state"), rows, "lllll")


def _results(stories: list[Story]) -> list[Block]:
    def row(name: str, value: Callable[[Story], str]) -> tuple[str, ...]:
        return (name, *(value(story) for story in stories))

    def passed(story: Story) -> str:
        made = [v.passed for v in verdicts(story) if v.passed is not None]
        return f"{sum(made)} of {len(made)}"

    rows = [
        row("steps", lambda s: f"{figures.count(s.last_step)} of {figures.count(s.planned_steps)}"),
        row("training loss at the end", lambda s: figures.loss(s.windowed_loss(s.last_step))),
        row("held-out loss, base", lambda s: figures.loss(s.base.loss if s.base else None)),
        row(
            "held-out loss, base in 4 bits",
            lambda s: figures.loss(s.quantized_base.loss if s.quantized_base else None),
        ),
        row("held-out loss, adapter", lambda s: figures.loss(s.adapter_loss)),
        row("adapter kept, of step", lambda s: figures.count(s.kept.step) if s.kept else "–"),
        row("trained parameters", lambda s: _trained(s)),
        row("time", lambda s: figures.duration(s.working_seconds)),
        row("speed", lambda s: _speed(s)),
        row("memory in use, highest", lambda s: _memory(s)),
        row("energy", lambda s: _energy(s)),
        row("checks passed", passed),
    ]
    columns = ["", *LETTERS[: len(stories)]]
    blocks: list[Block] = [Table(columns, rows, "l" + "r" * len(stories))]
    if not _comparable(stories):
        blocks.append(
            Paragraph(
                "Take care: the held-out losses of these runs were not measured on the same tokens "
                "of the same rows, so they cannot be compared with one another, only each with its "
                "own base."
            )
        )
    return blocks


def _comparable(stories: list[Story]) -> bool:
    """Whether the held-out rows, as tokens with loss, can be the same in all runs.

    Their number and that of their labels must be, and so must what decides which rows they are.
    """

    def key(story: Story) -> tuple[object, ...]:
        measured = story.adapter or story.quantized_base or story.base
        data = story.recipe.data
        drawn = data.held_out_from == "random" and data.held_out_path is None
        return (
            None if measured is None else (measured.rows, measured.labels),
            data.name,
            repr(data.sources),
            data.held_out_path,
            data.limit,
            data.loss_on,
            data.template,
            story.recipe.seed if drawn else None,
            story.audit.sha256 if story.audit else None,
        )

    return len({key(story) for story in stories}) == 1


def _trained(story: Story) -> str:
    return figures.NONE if story.model is None else figures.count(story.model.parameters_trainable)


def _speed(story: Story) -> str:
    seconds = sum(s.seconds for s in story.steps)
    return figures.speed(sum(s.tokens for s in story.steps), seconds)


def _memory(story: Story) -> str:
    peak = max((s.memory_bytes for s in story.steps), default=None)
    return figures.NONE if peak is None else figures.gib(peak)


def _energy(story: Story) -> str:
    found = story.energies
    return figures.watt_hours(sum(e.joules for e in found)) if found else "not reported"


def _differences(stories: list[Story]) -> list[Block]:
    flat = [flatten(story.recipe.model_dump()) for story in stories]
    keys = [k for k in dict.fromkeys(key for f in flat for key in f) if not k.startswith(_WORDS)]
    rows = [
        (Code(key), *(figures.setting(f.get(key)) for f in flat))
        for key in keys
        if any(f.get(key) != flat[0].get(key) for f in flat)
    ]
    if not rows:
        return [Paragraph("None: the runs have the same settings.")]
    return [Table(["setting", *LETTERS[: len(stories)]], rows, "l" + "l" * len(stories))]


def _picture(stories: list[Story]) -> Picture:
    parts = [
        f"run {letter} ends at {figures.loss(story.windowed_loss(story.last_step))}"
        for letter, story in zip(LETTERS, stories, strict=False)
        if story.steps
    ]
    return Picture(
        "comparison",
        f"Training loss by step of each run: {'; '.join(parts)}.",
        "Lines: training loss, mean as logged. Dots on a dashed line: held-out loss.",
    )


def _plot(stories: list[Story]) -> Plot | None:
    if not any(story.steps for story in stories):
        return None
    return draw("comparison", 4.2, lambda figure: _curves(figure, stories))


def _curves(figure: Figure, stories: list[Story]) -> None:
    axes = figure.add_subplot()
    prepare(axes, "loss (nats per token)", "step")
    for place, (letter, story) in enumerate(zip(LETTERS, stories, strict=False)):
        colour = COLOURS[place % len(COLOURS)]
        made = [s for s in story.steps if not s.left_out]
        window = max(1, min(story.recipe.training.logging_steps, len(made)))
        mean = finite(running_mean([s.loss for s in made], window))
        numbers = [s.step for s in made]
        axes.plot(
            numbers[window - 1 :],
            mean[window - 1 :],
            color=colour,
            linewidth=1.7,
            label=f"run {letter}",
        )
        held_out = story.evaluations
        axes.plot(
            [e.step for e in held_out],
            finite([e.loss for e in held_out]),
            color=colour,
            linewidth=1.0,
            linestyle=(0, (4, 2.5)),
            marker="o",
            markersize=4,
        )
    axes.legend(loc="upper right")
