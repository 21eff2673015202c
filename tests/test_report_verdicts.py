"""Each verdict passes where it should, fails where it should, and says when it cannot tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halfbyte.report import make_report
from halfbyte.report.story import read_story
from halfbyte.report.verdicts import verdicts
from page_reader import read_page
from run_records import EFFECTIVE, PER_EPOCH, write_run

PICTURES = True  # are looked at here

ALL_STEPS = "every planned step was done"
FINITE = "the loss of every step is a finite number"
SHARE = "at most 5 % of the parameters"
EPOCHS = "the mean training loss of each epoch"
FELL = "the training loss ended lower"
BELOW_4BIT = "the adapter's held-out loss is below the quantized base's"
BELOW_BASE = "the adapter's held-out loss is below the base's"
BEST = "the adapter that is kept has the lowest"
AGAIN = "the saved adapter read again"

LATE_RISE = dict.fromkeys(range(2 * PER_EPOCH + 1, 3 * PER_EPOCH + 1), 4.0)
# Every step overflowed fp16.
OVERFLOWED: dict[str, Any] = {
    "events": {"step": {"skipped": True}, "training_started": {"precision": "fp16"}}
}

CASES: list[tuple[str, dict[str, Any], bool | None]] = [
    (ALL_STEPS, {}, True),
    (ALL_STEPS, {"done": 57, "end": "interrupted"}, False),
    (ALL_STEPS, {"done": 120, "end": "cut"}, False),
    (ALL_STEPS, {"done": 0, "end": "cut"}, False),
    (FINITE, {}, True),
    (FINITE, {"losses": {33: float("nan")}}, False),
    (FINITE, {"losses": {33: float("inf")}}, False),
    (FINITE, {"events": {"step": {"skipped": True}}}, False),
    (FINITE, OVERFLOWED, True),
    (FINITE, {**OVERFLOWED, "losses": {33: float("nan")}}, True),
    (FINITE, {**OVERFLOWED, "done": 57, "end": "diverged"}, False),
    (FINITE, {"done": 0, "end": "cut"}, None),
    (SHARE, {}, True),
    (SHARE, {"events": {"model": {"parameters_trainable": 10_000_000}}}, False),
    (SHARE, {"events": {"model": {"parameters_trainable": 0}}}, False),
    (EPOCHS, {}, True),
    (EPOCHS, {"losses": LATE_RISE}, False),
    (EPOCHS, {"losses": {50: float("nan")}}, False),
    (EPOCHS, {"done": PER_EPOCH + 10, "end": "interrupted"}, None),
    (EPOCHS, {"done": 2 * PER_EPOCH, "end": "interrupted"}, True),
    (FELL, {}, True),
    (FELL, {"rises": True}, False),
    (FELL, {"done": 19, "end": "interrupted"}, None),
    (BELOW_4BIT, {}, True),
    (BELOW_4BIT, {"adapter_at_end": 3.3, "worse_after": None}, False),
    (BELOW_4BIT, {"held_out": False}, None),
    (BELOW_BASE, {}, True),
    (BELOW_BASE, {"adapter_at_end": 2.8, "worse_after": None}, False),
    (BELOW_BASE, {"adapter_at_end": float("nan")}, False),
    (BELOW_BASE, {"base": None}, None),
    (BEST, {}, True),
    (BEST, {"events": {"kept": {"step": 120, "held_out_loss": 9.0}}}, False),
    (BEST, {"adapter_at_end": float("nan")}, False),
    (BEST, {"held_out": False}, None),
    (BEST, {"done": 57, "end": "interrupted"}, None),
    (AGAIN, {}, True),
    (AGAIN, {"checks": (False,)}, False),
    (AGAIN, {"done": 57, "end": "interrupted"}, None),
]


@pytest.mark.parametrize(("name", "options", "passed"), CASES)
def test_verdict(tmp_path: Path, name: str, options: dict[str, Any], passed: bool | None) -> None:
    found = verdicts(read_story(write_run(tmp_path, **options)))
    [verdict] = [v for v in found if v.name.startswith(name)]
    assert verdict.passed is passed, verdict
    assert verdict.detail


def test_every_verdict_is_tried_both_ways(tmp_path: Path) -> None:
    for verdict in verdicts(read_story(write_run(tmp_path))):
        tried = {passed for name, _, passed in CASES if verdict.name.startswith(name)}
        assert {True, False} <= tried, verdict.name


def test_a_failure_is_seen(tmp_path: Path) -> None:
    """In the table of verdicts and in the fifth sentence of page one."""
    page = read_page(make_report(write_run(tmp_path, checks=(False,))).html)
    [rows] = [t for t in page.tables if t[0][0] == "verdict"]
    assert [row[0] for row in rows[1:]].count("failed") == 1
    assert rows[-1][0] == "failed"
    assert "8 of 9 checks passed; what does not hold: “the saved adapter" in page.lists[0][4]


def test_kept_as_asked_though_not_the_best(tmp_path: Path) -> None:
    """The recipe may ask for the last adapter; the report says what that cost."""
    last = EFFECTIVE.replace("keep: best", "keep: last")
    folder = write_run(tmp_path, effective=last, events={"kept": {"step": 120}})
    text = make_report(folder).markdown.read_text()
    assert "as the recipe asks, though step 96 had a lower held-out loss (1.6547)" in text
