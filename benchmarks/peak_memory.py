"""How far the resident memory of a process rises, measured in child processes of a benchmark."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import write_results

Figures = dict[str, tuple[float, str]]  # metric: (value, unit)
BOUND = "share of bound"  # the metric that may not be over 1


def measure(case: str, tool: str, script: str, child: list[str]) -> list[dict[str, Any]]:
    """Run ``script --child …``, whose last line of output is its figures in JSON; show them, and
    return them as rows of results."""
    command = [sys.executable, script, "--child", *child]
    ended = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    figures: Figures = json.loads(ended.stdout.splitlines()[-1])
    _show(case, tool, figures)
    return [
        {"case": case, "tool": tool, "metric": metric, "value": value, "unit": unit}
        for metric, (value, unit) in figures.items()
    ]


def finish(name: str, rows: list[dict[str, Any]], *, write: bool) -> None:
    """Write ``results/NAME.json`` if asked to; end with an error where a bound is passed."""
    if write:
        written = write_results(name, rows).read_text(encoding="utf-8")
        print(json.dumps(json.loads(written)))
    over = [row["case"] for row in rows if row["metric"] == BOUND and row["value"] > 1]
    if over:
        sys.exit(f"over the bound: {', '.join(over)}")


def reset_peak() -> int:
    """Forget the high-water mark of resident memory; returns what is resident now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(key: str) -> int:
    """A figure of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) * 1024


def _show(case: str, tool: str, figures: Figures) -> None:
    print(f"{tool}: {case}")
    for metric, (value, unit) in figures.items():
        text = f"{value / 1e6:,.1f} MB" if unit == "bytes" else f"{value:,.2f} {unit}".rstrip()
        print(f"    {metric:<28}{text:>16}")
