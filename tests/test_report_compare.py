"""Several runs laid over one another."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.errors import RunError
from halfbyte.report import compare_runs, make_report
from page_reader import Page, read_page
from run_records import EFFECTIVE, write_run

PICTURES = True  # are looked at here


def table(page: Page, first: str) -> list[list[str]]:
    return next(t for t in page.tables if t[0][0] == first)


def test_two_runs(tmp_path: Path) -> None:
    other = EFFECTIVE.replace("r: 16", "r: 64").replace(
        "learning_rate: 0.0002", "learning_rate: 1.0e-05"
    )
    other = other.replace("title: Harbour", "title: <b>Other</b> $\\frac harbour")
    a = write_run(tmp_path / "first")
    b = write_run(tmp_path / "_second<i>", effective=other, adapter_at_end=1.9, energy=None)
    page_path = compare_runs([a, b], tmp_path / "out" / "both.html")
    assert page_path == tmp_path / "out" / "both.html"
    page = read_page(page_path)
    assert [row[1] for row in table(page, "run")[1:]] == ["first", "_second<i>"]
    assert table(page, "run")[2][2] == "<b>Other</b> $\\frac harbour pilot answers with SmolLM2"
    assert {row[0]: row[1:] for row in table(page, "setting")[1:]} == {
        "lora.r": ["16", "64"],
        "training.learning_rate": ["0.0002", "1e-05"],
    }
    [results] = [t for t in page.tables if t[0] == ["", "A", "B"]]
    by_name = {row[0]: row[1:] for row in results[1:]}
    assert by_name["held-out loss, base"] == ["2.7041", "2.7041"]
    assert by_name["energy"] == ["1.45 Wh", "not reported"]
    for place, folder in enumerate((a, b)):
        alone = read_page(make_report(folder).html)
        [losses] = [t for t in alone.tables if "held-out loss" in t[0][1] and t[0][0] == "model"]
        assert by_name["held-out loss, adapter"][place] == losses[3][1]
    assert [tag for tag, _ in page.tags].count("svg") == 1
    assert "Take care" not in page.text
    again = page_path.read_bytes()
    assert compare_runs([a, b], tmp_path / "out" / "both.html").read_bytes() == again


def test_losses_of_other_rows_are_not_compared(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a")
    other_seed = EFFECTIVE.replace("seed: 42", "seed: 43")  # draws other held-out rows
    b = write_run(tmp_path / "b", effective=other_seed)
    page = read_page(compare_runs([a, b], tmp_path))
    assert "cannot be compared with one another" in page.text
    assert (tmp_path / "comparison.html").exists()


def test_runs_without_steps(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / n, done=0, end="cut") for n in "ab"]
    page = read_page(compare_runs(folders, tmp_path / "c.html"))
    assert "svg" not in [tag for tag, _ in page.tags]
    assert "None: the runs have the same settings." in page.text


def test_how_many(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="2 to 26 runs and 1 were named"):
        compare_runs([write_run(tmp_path / "a")], tmp_path / "c.html")
