"""Puts what was injected, fuzzed and measured into docs/reliability.md.

    python benchmarks/reliability_tables.py [--check]

As performance_tables.py does for its page, from results/chaos.json (``make chaos``), fuzz.json
(``make fuzz``) and checkpoints_gpu.json (checkpoints.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

from performance_tables import Tables, figures, main, markdown, missing, source
from record import ROOT

PAGE = ROOT / "docs" / "reliability.md"


def faults(results: Path) -> str:
    """Each fault, how often it was injected, and what came of it."""
    return _counts(results, "chaos", "make chaos", "fault", ("injected", "survived", "lost"))


def inputs(results: Path) -> str:
    """Each kind of file, how many were made wrong, and how many were answered wrongly."""
    return _counts(results, "fuzz", "make fuzz", "kind of input", ("inputs", "errors found"))


def _counts(results: Path, name: str, command: str, first: str, metrics: tuple[str, ...]) -> str:
    found = figures(results, name)
    if not found:
        return missing(name, command)
    rows = [
        (case, *(values[m] for m in metrics))
        for (case, _), values in found.items()
        if metrics[0] in values
    ]
    sums = ("all", *(sum(float(row[n]) for row in rows) for n in range(1, len(metrics) + 1)))
    shown = [(str(row[0]), *(f"{float(v):,.0f}" for v in row[1:])) for row in [*rows, sums]]
    return markdown((first, *metrics), shown) + "\n" + source(results, name)


def checkpoints(results: Path) -> str:
    """What writing checkpoints beside the steps costs these."""
    found = figures(results, "checkpoints_gpu")
    if not found:
        return missing("checkpoints_gpu", "python benchmarks/checkpoints.py --write")
    head = (
        "checkpoints",
        "steps stand still, each",
        "of the steps' time",
        "written beside them in",
    )
    rows = [
        (
            case,
            f"{values['still_ms_each']:.1f} ms",
            f"{values['share']:.1%}",
            f"{values['write_ms_each']:.0f} ms",
        )
        for (case, _), values in found.items()
    ]
    return markdown(head, rows) + "\n" + source(results, "checkpoints_gpu")


TABLES: Tables = {"faults": faults, "inputs": inputs, "checkpoints": checkpoints}

if __name__ == "__main__":
    sys.exit(main(page=PAGE, tables=TABLES))
