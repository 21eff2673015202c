"""What the audit found, for a report and for the page of ``halfbyte data``."""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.events.types import Found
from halfbyte.report.blocks import Block, Finding, Findings, Heading, Paragraph
from halfbyte.report.story import Story


def findings(story: Story) -> list[Block]:
    """The section on the data's audit; nothing in records of before there was one."""
    if story.audit is None or not story.findings:
        return []
    return [Heading("What the audit found"), shown(story.findings)]


def shown(found: Sequence[Found]) -> Block:
    """The findings in the order they come in."""
    if not found:
        return Paragraph("Nothing that could spoil a run.")
    return Findings([_shown(one) for one in found])


def _shown(one: Found) -> Finding:
    rows = ", ".join(one.places)
    more = ", …" if one.count > len(one.rows) else ""
    return Finding(
        severity="accepted" if one.accepted else one.severity,
        name=one.name,
        text=_sentence(one.text),
        todo=_sentence(one.todo),
        where=f"{'Rows' if one.count > 1 else 'Row'} {rows}{more}" if rows else "",
        examples=one.examples,
    )


def _sentence(clause: str) -> str:
    return f"{clause[:1].upper()}{clause[1:]}."
