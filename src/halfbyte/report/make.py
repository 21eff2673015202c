"""A run folder's report: records in, files out."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from halfbyte.errors import RunError
from halfbyte.report import figures
from halfbyte.report.appendices import appendices
from halfbyte.report.blocks import Document
from halfbyte.report.html import to_html
from halfbyte.report.markdown import to_markdown
from halfbyte.report.page_one import page_one, state
from halfbyte.report.pdf import print_pdf
from halfbyte.report.plots import plots
from halfbyte.report.sections import objective, sections
from halfbyte.report.story import Story, read_story


@dataclass(frozen=True)
class ReportFiles:
    """Where a report was written."""

    markdown: Path
    html: Path
    pdf: Path | None
    plots: list[Path] = field(default_factory=list)


def make_report(folder: Path, *, pdf: bool = False) -> ReportFiles:
    """Write the report of the run in ``folder`` into it, from its records alone.

    ``report.md``, ``report.html`` and ``plots/*.png``, each replaced whole or not at all; the same
    records give the same bytes. With ``pdf`` also ``report.pdf``. Works for a run in any state.
    Raises RunError where there is no run, where it cannot be written, and where a PDF is asked
    for and there is no Chromium.
    """
    folder = Path(folder)
    if (folder / "plots").is_symlink():  # in a folder of somebody else's it may lead anywhere
        raise RunError(f"{folder / 'plots'} is a link to another folder; remove it.")
    story = read_story(folder)
    document = report_document(story)
    drawn = plots(story)
    files = ReportFiles(
        markdown=folder / "report.md",
        html=folder / "report.html",
        pdf=folder / "report.pdf" if pdf else None,
        plots=[folder / "plots" / f"{name}.png" for name in drawn],
    )
    for path, plot in zip(files.plots, drawn.values(), strict=True):
        write_whole(path, plot.png)
    write_whole(files.markdown, to_markdown(document).encode())
    page = to_html(document, {name: plot.svg for name, plot in drawn.items()})
    write_whole(files.html, page.encode())
    if files.pdf is not None:
        write_whole(files.pdf, print_pdf(files.html))
    return files


def report_document(story: Story) -> Document:
    """The report of one run, before it is Markdown or HTML."""
    when = [] if story.begin is None else [figures.moment(story.begin)]
    author = f"by {story.recipe.author}" if story.recipe.author else "author not stated"
    return Document(
        title=story.title,
        kicker="Fine-tuning report",
        facts=[author, *when, f"run {story.name}"],
        state=state(story),
        objective=objective(story),
        page_one=page_one(story),
        sections=sections(story),
        appendices=appendices(story),
    )


def write_whole(path: Path, content: bytes) -> None:
    """Write ``path`` so that it is there whole or as it was. Raises RunError where it cannot be."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}); free some space or mend its permissions."
        ) from error
