"""What cleaning left of the rows, for the report."""

from __future__ import annotations

from halfbyte.data.example import counted
from halfbyte.events.types import Funnel
from halfbyte.report import figures
from halfbyte.report.blocks import Block, Code, Heading, Paragraph, Table
from halfbyte.report.story import Story


def funnel(story: Story) -> list[Block]:
    """The filters in their order and what each dropped; nothing where the recipe lists none."""
    if story.funnel is None:
        return []
    return [Heading("Cleaning"), funnel_table(story.funnel)]


def funnel_table(cleaned: Funnel) -> Table:
    """Each filter with the rows that it got, dropped and changed."""
    rows = [
        (
            Code(step.name),
            step.settings or figures.NONE,
            figures.count(step.rows_in),
            figures.count(step.dropped),
            figures.percentage(step.dropped, step.rows_in),
            figures.count(step.changed),
        )
        for step in cleaned.filters
    ]
    total = (
        f"{figures.count(cleaned.rows_out)} rows left",
        "",
        figures.count(cleaned.rows_in),
        figures.count(cleaned.dropped),
        figures.percentage(cleaned.dropped, cleaned.rows_in),
        figures.count(sum(step.changed for step in cleaned.filters)),
    )
    return Table(
        ("filter", "settings", "rows in", "dropped", "share", "changed"),
        [*rows, total],
        "llrrrr",
        "In the order in which they were applied; the rows left train or are held out.",
        total=True,
    )


def rows_shown(story: Story) -> list[Block]:
    """A few rows of each filter, and what shows why it took them."""
    if story.funnel is None:
        return []
    rows = [
        (
            Code(step.name),
            counted(row.row, row.source),
            row.text,
        )
        for step in story.funnel.filters
        for row in step.examples
    ]
    if not rows:
        return [Heading("Rows that cleaning took"), Paragraph("No filter found any.")]
    caption = "The first rows that each filter dropped or changed, and why."
    return [
        Heading("Rows that cleaning took"),
        Table(("filter", "row", "what shows it"), rows, "lrl", caption),
    ]
