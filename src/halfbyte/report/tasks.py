"""What lm-evaluation-harness found of the finished adapter and its base."""

from __future__ import annotations

from halfbyte.report import figures
from halfbyte.report.blocks import Block, Heading, Paragraph, Table
from halfbyte.report.story import Story

TITLE = "Tasks of lm-evaluation-harness"


def tasks(story: Story) -> list[Block]:
    """The part on the tasks; nothing where none were asked."""
    found = story.tasks
    if found is None:
        return []
    if isinstance(found, str):
        again = f"{found}; make it again with halfbyte evaluate --lm-eval."
        return [Heading(TITLE), Paragraph(again)]
    how = "in the format that was trained" if found.chat else "as plain text"
    before = "" if not found.num_fewshot else f", after {found.num_fewshot} examples of each"
    blocks: list[Block] = [
        Heading(TITLE),
        Paragraph(
            "The adapter and its base, which is the same model in 4 bits without the adapter, "
            f"asked {how}{before}, by lm-evaluation-harness {found.version}."
        ),
    ]
    if story.is_of_another_adapter(found.adapter_sha256):
        blocks.append(
            Paragraph(
                "The figures are of an earlier adapter of this run, and not of the one that it has "
                "now; make them again with halfbyte evaluate --lm-eval."
            )
        )
    rows = []
    for number, figure in enumerate(found.figures):
        first = number == 0 or found.figures[number - 1].task != figure.task
        count = found.rows.get(figure.task)
        rows.append(
            (
                figure.task if first else "",
                figure.metric_text,
                figures.count(count) if first and count is not None else "",
                figure.text(adapter=False),
                figure.text(adapter=True),
                _VERDICT[figure.adapter_is_better],
            )
        )
    columns = ("task", "metric", "rows", "base", "adapter", "the adapter is")
    note = (
        "±: one standard error. ↑: higher is better, ↓: lower is. Better or worse: by more than "
        "two standard errors of the difference."
    )
    blocks.append(Table(columns, rows, "llrrrl", note))
    return blocks


_VERDICT = {True: "better", False: "worse", None: "–"}
