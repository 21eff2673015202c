"""The tables of the documentation that hold measurements are those of the result files."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
floors = importlib.import_module("floors")
tables = importlib.import_module("performance_tables")
reliability = importlib.import_module("reliability_tables")
targets = importlib.import_module("target_tables")


def write(folder: Path, name: str, rows: list[tuple[Any, ...]]) -> None:
    keys = ("case", "tool", "metric", "value", "unit")
    made = {
        "command": "python benchmarks/x.py",
        "commit": "abc1234",
        "date": "2026-01-02",
        "device": "a GPU",
        "versions": {},
        "rows": [dict(zip(keys, row, strict=True)) for row in rows],
    }
    (folder / f"{name}.json").write_text(json.dumps(made), encoding="utf-8")


def cells(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize(
    "of", [tables, reliability, targets], ids=["performance", "reliability", "targets"]
)
def test_the_page_is_current(of: Any) -> None:
    page = of.PAGE.read_text(encoding="utf-8")
    assert tables.render(page, tables=of.TABLES) == page, f"run python benchmarks/{of.__name__}.py"
    shown = {match[2] for match in tables._MARKED.finditer(page)}
    assert shown == set(of.TABLES), "a table is not in the page"


def test_a_table_is_put_between_its_marks_and_a_wrong_name_is_told(tmp_path: Path) -> None:
    page = "a\n<!-- table: peers -->\nold\n<!-- end of table -->\nb\n"
    made = tables.render(page, tmp_path)
    assert made.startswith("a\n<!-- table: peers -->\n*Not measured yet")
    assert made.endswith("\n<!-- end of table -->\nb\n")
    assert "old" not in made
    assert tables.render(made, tmp_path) == made
    with pytest.raises(ValueError, match="'piers'"):
        tables.render(page.replace("peers", "piers"), tmp_path)


def test_parts_stand_beside_their_floors(tmp_path: Path) -> None:
    work = floors.step_work(floors.TINYLLAMA, [256] * 4, labels=1024, recomputed=22, from_nf4=3)
    part = floors.floor_ms(floors.of_part(work, floors.NORMS, floors.ROTARY), floors.MEASURED_H100)
    whole = floors.floor_ms(work, floors.MEASURED_H100)
    both = f"{floors.NORMS} + {floors.ROTARY}"
    write(
        tmp_path,
        "step_profile",
        [
            ("tight", "halfbyte", "tokens_padded", 1024, "tokens"),
            ("tight", "halfbyte", "layers_recomputed", 22, "layers"),
            ("tight", "halfbyte", "layers_from_nf4", 3, "layers"),
            ("tight", "halfbyte", "ms_per_step", 2 * whole, "ms"),
            (f"tight: {both}", "halfbyte", "kernels", 100, "a step"),
            (f"tight: {both}", "halfbyte", "kernel_ms", 4 * part, "ms"),
            ("tight: PyTorch's own passes", "halfbyte", "kernels", 7, "a step"),
            ("tight: PyTorch's own passes", "halfbyte", "kernel_ms", part, "ms"),
        ],
    )
    table = tables.TABLES["profile-tight"](tmp_path)
    assert f"{2 * whole:.2f} ms a step of 1024 positions; the floor" in table
    assert "is 50% of that" in table
    first, other, total = cells(table)
    rate = floors.moved(floors.of_part(work, floors.NORMS, floors.ROTARY)) / (4 * part) / 1e6
    assert first == [both, "100", f"{4 * part:.3f}", f"{part:.3f}", "25%", f"{rate:,.0f} GB/s"]
    assert other[3:] == ["", "", ""]
    assert total[:3] == ["all kernels", "107", f"{5 * part:.3f}"]
    assert "Not measured yet" in tables.TABLES["profile-free"](tmp_path)


def test_goals_are_judged_against_the_best_peer(tmp_path: Path) -> None:
    write(
        tmp_path,
        "gpu_vs_peers",
        [
            ("tinyllama-free", "halfbyte", "ms_per_step", 8.4, "ms"),
            ("tinyllama-free", "unsloth", "ms_per_step", 200.0, "ms"),
            ("tinyllama-free", "halfbyte / unsloth", "ratio", 23.8, ""),
            ("tinyllama-free", "halfbyte / trl", "ratio", 40.0, ""),
            ("tinyllama-tight", "halfbyte", "ms_per_step", 14.0, "ms"),
            ("tinyllama-tight", "halfbyte", "peak_gib", 1.5, "GiB"),
            ("tinyllama-tight", "unsloth", "peak_gib", 1.2, "GiB"),
            ("tinyllama-packed-16k", "halfbyte", "tokens_per_s", 107_527.0, "tokens/s"),
            ("tinyllama-fp16", "halfbyte", "ms_per_step", 12.6, "ms"),
            ("recipe-cold", "halfbyte", "wall_s", 46.0, "s"),
        ],
    )
    judged = [(row[3], row[4]) for row in cells(tables.TABLES["goals"](tmp_path))]
    assert judged == [
        ("8.4", "aim reached"),
        ("23.8", "**not reached**"),
        ("14", "reached"),
        ("", "not measured"),
        ("1.25", "**not reached**"),
        ("108", "reached"),
        ("46", "**not reached**"),
        ("", "not measured"),
        ("1.5", "reached"),
    ]
    peers = cells(tables.TABLES["peers"](tmp_path))
    assert peers[1] == ["", "Unsloth", "200.0", "", "", "", "23.8", ""]


def test_no_card_is_promised_more_than_its_floor_gives(tmp_path: Path) -> None:
    """A card as slow as its products alone gains nothing over peers that wait for it, too."""
    write(
        tmp_path,
        "step_profile",
        [(way, "halfbyte", "ms_per_step", 10.0, "ms") for way in ("free", "tight")],
    )
    write(tmp_path, "gpu_vs_peers", [("tinyllama-free", "trl", "ms_per_step", 100.0, "ms")])
    found = {row[0]: row for row in cells(tables.TABLES["expected"](tmp_path))}
    work, _ = floors.both_ways(floors.TINYLLAMA, [192] * 4, 768)
    h100, slow = floors.CARDS[-1], next(c for c in floors.CARDS if "3060" in c.name)
    step = floors.floor_ms(work, slow) / floors.floor_ms(work, h100) * 10.0
    assert found["H100 SXM"][2:4] == ["10", "10.0 to 10.0"]
    assert step > 100
    assert found[slow.name][2:4] == [f"{step:.0f}", "1.0 to 1.0"]
