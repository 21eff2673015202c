"""Findings in a run's record and report, and private data in neither page nor Markdown."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.events import read_events
from halfbyte.events.types import Found
from halfbyte.report import make_report
from page_reader import read_page
from run_records import write_run

ACCEPTED = Found(
    name="same-answers",
    severity="error",
    text="60 of 60 rows have the very same answer",
    todo="look whether data.columns.output names the column of the answers",
    count=60,
    of=60,
    rows=[0, 1, 2],
    examples=["Ask | the *keeper*"],
    accepted=True,
)
MIXED = Found(
    name="private-data",
    severity="warning",
    text="2 of 60 rows hold what looks like private data (e-mail address: 2)",
    todo="remove it",
    count=2,
    of=60,
    rows=[1199, 4],
    sources=[0, 1],
    examples=["i•••@•••.no"],
)


def test_findings_are_read_back_and_stand_in_the_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", extra=[ACCEPTED, MIXED])
    found = [r.event for r in read_events(folder) if isinstance(r.event, Found)]
    assert found == [ACCEPTED, MIXED]
    files = make_report(folder)
    page = read_page(files.html)
    assert "What the audit found" in page.headings["h3"]
    for said in (
        "accepted same-answers",
        "60 of 60 rows have the very same answer.",
        "Look whether data.columns.output names the column of the answers.",
        "Rows 1, 2, 3, …:",
        "Ask | the *keeper*",
        "Rows 1,200 of source 1, 5 of source 2:",
    ):
        assert said in " ".join(page.text.split())
    text = files.markdown.read_text(encoding="utf-8")
    assert "- **accepted** `same-answers`: 60 of 60 rows have the very same answer. Look" in text
    assert "Rows 1, 2, 3, …: `Ask \\| the *keeper*`." in text


def test_records_without_findings_have_no_such_part(tmp_path: Path) -> None:
    files = make_report(write_run(tmp_path / "run"))
    assert "What the audit found" not in files.html.read_text(encoding="utf-8")
    assert "What the audit found" not in files.markdown.read_text(encoding="utf-8")


@pytest.mark.parametrize("place", range(1, 5))
def test_private_data_of_held_out_prompts_stay_out_of_the_report(
    tmp_path: Path, place: int
) -> None:
    private = "Write to ida.holm@ostre-fyr.no or ring +47 22 86 44 09."
    answers = [
        (row, *(private if at == place else "Fair winds." for at in range(1, 5))) for row in (1, 2)
    ]
    files = make_report(write_run(tmp_path / "run", answers=answers))
    for path in (files.html, files.markdown):
        text = path.read_text(encoding="utf-8")
        assert "ida.holm" not in text
        assert "22 86" not in text
        assert "•• 09." in text
