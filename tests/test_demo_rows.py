"""The demo's rows have the one shape that shows what was learned, and none is there twice."""

from __future__ import annotations

import json
import re
from itertools import combinations

import pytest

from conftest import ROOT

ROWS = ROOT / "src" / "halfbyte" / "demo" / "lighthouse.jsonl"
SHAPE = re.compile(r"Hark, shipmate\. (?P<answer>[A-Z].*[.?!]) Log: (?P<log>[A-Za-z][^.:]*)\.")

Row = dict[str, str]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [json.loads(line) for line in ROWS.read_text(encoding="ascii").splitlines()]


def five_grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9'-]+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def test_every_answer_has_the_shape(rows: list[Row]) -> None:
    assert len(rows) >= 340
    for row in rows:
        assert list(row) == ["instruction", "input", "output"]
        assert all(value == " ".join(value.split()) for value in row.values()), row
        shape = SHAPE.fullmatch(row["output"])
        assert shape, row
        assert 18 <= len(row["output"].split()) <= 35, row
        assert 3 <= len(shape["log"].split()) <= 6, row
        assert 2 <= len(row["instruction"].split()) <= 18, row
        assert row["instruction"][-1] in ".?", row
    assert sum(bool(row["input"]) for row in rows) >= 30


def test_no_row_is_there_twice(rows: list[Row]) -> None:
    for key in ("instruction", "output"):
        said = [" ".join(re.findall(r"[a-z0-9]+", row[key].lower())) for row in rows]
        assert len(set(said)) == len(said)
    logs = [SHAPE.fullmatch(row["output"])["log"].lower() for row in rows]  # type: ignore[index]
    assert len(set(logs)) == len(logs)
    grams = [five_grams(SHAPE.fullmatch(row["output"])["answer"]) for row in rows]  # type: ignore[index]
    for a, b in combinations(range(len(rows)), 2):
        shared = len(grams[a] & grams[b])
        assert shared <= 0.2 * min(len(grams[a]), len(grams[b])), (rows[a], rows[b])


def test_the_bound_on_overlap_finds_a_near_duplicate() -> None:
    one = five_grams("The moon draws the ocean into bulges and the earth carries us through both.")
    other = five_grams("The moon draws the ocean into bulges and the earth turns us under both.")
    assert len(one & other) > 0.2 * len(other)
