"""Puts what each target of an export gives back into docs/after-training.md.

    python benchmarks/target_tables.py [--check]

As performance_tables.py does for its page, from results/targets.json (targets.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

from performance_tables import Tables, figures, main, markdown, missing, source
from record import ROOT

PAGE = ROOT / "docs" / "after-training.md"


def targets(results: Path) -> str:
    """Each target, the program that loaded it, and how near its logits came."""
    found = figures(results, "targets")
    if not found:
        return missing("targets", "python benchmarks/targets.py RUN --write")
    head = (
        "target",
        "loaded by",
        "compared with",
        "largest",
        "mean",
        "KL, nats",
        "top 1",
        "tokens",
    )
    rows = []
    for (case, program), values in found.items():
        target, against, tokens = case.split(" | ")
        apart = (f"{values['largest']:.2g}", f"{values['mean']:.2g}", f"{values['kl']:.2g}")
        rows.append((target, program, against, *apart, f"{values['top1']:.1%}", tokens))
    return markdown(head, rows) + "\n" + source(results, "targets")


TABLES: Tables = {"targets": targets}

if __name__ == "__main__":
    sys.exit(main(page=PAGE, tables=TABLES))
