"""Puts what was measured into docs/performance.md.

    python benchmarks/performance_tables.py [--check]

Between ``<!-- table: NAME -->`` and ``<!-- end of table -->`` the page has tables made here, from
floors.py and the files of results/, so that it never says other than they do. ``--check`` writes
nothing and exits 1 if the page is not what would be written; a test does the same.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import floors
from record import ROOT
from step_profile import VARIANTS

PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
TOKENS, ROWS = 768, 4  # of the page's floors
_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)

Tables = dict[str, Callable[[Path], str]]
Figures = dict[tuple[str, str], dict[str, float]]  # by case and tool: metric to value

# Fastest and slowest of Unsloth and TRL on another machine, for a page without gpu_vs_peers.json.
EARLIER_MS = {"free": [255.0, 358.0], "tight": [333.0, 567.0]}
PEERS = {"unsloth": "Unsloth", "trl": "TRL", "trl-liger": "TRL, Liger"}
CASES = {
    "tinyllama-free": "memory free to use",
    "tinyllama-tight": "no more memory than Unsloth with checkpointing",
    "tinyllama-packed-16k": "about 16k tokens a step",
    "tinyllama-fp16": "fp16 and what a T4 has",
    "tinyllama-free-nodropout": "memory free to use, dropout 0",
    "tinyllama-tight-nodropout": "memory as Unsloth's, dropout 0",
}


def render(page: str, results: Path = RESULTS, tables: Tables | None = None) -> str:
    """``page`` with every marked table made anew, by default those of docs/performance.md.

    Raises ValueError for a name that is unknown.
    """
    known = TABLES if tables is None else tables

    def table(match: re.Match[str]) -> str:
        name = match[2]
        if name not in known:
            raise ValueError(f"there is no table {name!r}; there are {', '.join(known)}")
        return f"{match[1]}{known[name](results)}\n{match[4]}"

    return _MARKED.sub(table, page)


def figures(results: Path, name: str) -> Figures:
    """What results/NAME.json holds; empty without the file."""
    path = results / f"{name}.json"
    found: Figures = {}
    if path.exists():
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            found.setdefault((row["case"], row["tool"]), {})[row["metric"]] = row["value"]
    return found


def source(results: Path, name: str) -> str:
    """Where the figures come from, as a line below a table."""
    made: dict[str, Any] = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
    at = f", commit {made['commit']}" if made["commit"] else ""
    link = f"[{name}.json](../benchmarks/results/{name}.json)"
    return f"\n{made['device']}, {made['date']}{at}: {link}."


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    line = "| --- |" + " ---: |" * (len(head) - 1)
    first, *others = ("| " + " | ".join(cells) + " |" for cells in [head, *rows])
    return "\n".join([first, line, *others])


def missing(name: str, command: str) -> str:
    return f"*Not measured yet; `{command}` writes `benchmarks/results/{name}.json`.*"


def parts(results: Path) -> str:
    return floors.parts_table(floors.TINYLLAMA, floors.even_rows(TOKENS, ROWS), TOKENS)


def cards(results: Path) -> str:
    return floors.cards_table(floors.TINYLLAMA, floors.even_rows(TOKENS, ROWS), TOKENS)


def expected(results: Path) -> str:
    """For each card the step, if it comes as near to its floor as the H100, and the peers' there.

    A peer takes at least its host's time, which does not depend on the card, and at least what its
    products and passes take, of which halfbyte's own are a lower bound.
    """
    ours, peers = figures(results, "step_profile"), figures(results, "gpu_vs_peers")
    theirs = {
        case: _peers_ms(peers, f"tinyllama-{case}") or earlier
        for case, earlier in EARLIER_MS.items()
    }
    steps = {case: ours.get((case, "halfbyte"), {}).get("ms_per_step") for case in theirs}
    if any(step is None for step in steps.values()):
        return missing("step_profile", "python benchmarks/step_profile.py …")
    rows = floors.even_rows(TOKENS, ROWS)
    ways = dict(zip(theirs, floors.both_ways(floors.TINYLLAMA, rows, TOKENS), strict=True))
    nominal = floors.CARDS[-1]
    body = []
    for card in floors.CARDS:
        cells = [card.name]
        for case, work in ways.items():
            floor = floors.floor_ms(work, card)
            share = floors.floor_ms(work, nominal) / float(steps[case] or 0)
            step = floor / share
            fastest, slowest = (max(ms, step) for ms in (min(theirs[case]), max(theirs[case])))
            cells += [
                f"{floor:.0f}",
                f"{step:.0f}",
                f"{fastest / step:.1f} to {slowest / step:.1f}",
                f"{max(theirs[case]) / floor:.1f}",
            ]
        body.append(cells)
    columns = ("floor, ms", "as near to it as the H100, ms", "times as fast", "at most")
    head = ["card", *columns, *(f"recomputed: {name}" for name in columns)]
    return markdown(head, body)


def _peers_ms(found: Figures, case: str) -> list[float]:
    return [
        values["ms_per_step"]
        for (name, tool), values in found.items()
        if name == case and tool in PEERS and "ms_per_step" in values
    ]


def before(results: Path) -> str:
    name = "gpu_recipe_before"
    found = figures(results, name)
    rows = [
        [label, f"{values['ms_per_step']:.0f}", f"{values['peak_gib']:.2f}"]
        for case, label in (
            ("recipe again", "the recipe: every layer recomputed"),
            ("nothing recomputed", "nothing recomputed"),
            ("double quantization", "the recipe with double quantization"),
        )
        for values in [found[case, "halfbyte"]]
    ]
    return markdown(["case", "ms a step", "peak GiB"], rows) + "\n" + source(results, name)


def profile(variant: str) -> Callable[[Path], str]:
    """A table of the parts of one variant of step_profile.json, each beside its floor."""

    def table(results: Path) -> str:
        found = figures(results, "step_profile")
        step = found.get((variant, "halfbyte"))
        if step is None:
            return missing(
                "step_profile", f"python benchmarks/step_profile.py … --variant {variant}"
            )
        tokens = round(step["tokens_padded"])
        work = floors.step_work(
            floors.TINYLLAMA,
            floors.even_rows(tokens, ROWS),
            labels=tokens,
            recomputed=round(step["layers_recomputed"]),
            from_nf4=round(step["layers_from_nf4"]),
        )
        rows, total, kernels = [], 0.0, 0.0
        for (case, _), values in found.items():
            if not case.startswith(f"{variant}: "):
                continue
            label = case.removeprefix(f"{variant}: ")
            own = floors.of_part(work, *label.split(" + "))
            rows.append(_part_row(label, values["kernels"], values["kernel_ms"], own))
            total, kernels = total + values["kernel_ms"], kernels + values["kernels"]
        rows.append([*_part_row("all kernels", kernels, total, work)[:-1], ""])
        eager = step.get("eager_ms_per_step")
        beside = "" if eager is None else f", launched kernel by kernel {eager:.1f} ms"
        floor = floors.floor_ms(work, floors.MEASURED_H100)
        ms = step["ms_per_step"]
        return (
            f"{ms:.2f} ms a step of {tokens} positions{beside}; the floor, {floor:.2f} ms, is "
            f"{floor / ms:.0%} of that.\n\n"
            + markdown(
                ["part", "kernels", "ms", "floor, ms", "floor / ms", "reached"],
                rows,
            )
            + "\n"
            + source(results, "step_profile")
        )

    return table


def _part_row(label: str, kernels: float, ms: float, work: list[floors.Work]) -> list[str]:
    """``reached``: products in TFLOP/s where they bound the part, else bytes in GB/s."""
    cells = [label, f"{kernels:,.0f}", f"{ms:.3f}"]
    if not work:
        return [*cells, "", "", ""]
    floor = floors.floor_ms(work, floors.MEASURED_H100)
    reached = f"{floors.moved(work) / ms / 1e6:,.0f} GB/s"
    card = floors.MEASURED_H100
    if floors.operations(work) / card.tflops / 1e12 > floors.moved(work) / card.gb_per_s / 1e9:
        reached = f"{floors.operations(work) / ms / 1e9:,.0f} TFLOP/s"
    return [*cells, f"{floor:.3f}", f"{floor / ms:.0%}", reached]


def peers(results: Path) -> str:
    """Every case of gpu_vs_peers.json that has steps."""
    name = "gpu_vs_peers"
    found = figures(results, name)
    if not found:
        return missing(name, "python benchmarks/gpu_vs_peers.py …")
    rows = []
    for case, words in CASES.items():
        for tool, label in {"halfbyte": "halfbyte", **PEERS}.items():
            values = found.get((case, tool))
            if values is None:
                continue
            ratio = found.get((case, f"halfbyte / {tool}"), {})
            rows.append(
                [
                    words if tool == "halfbyte" else "",
                    label,
                    _cell(values, "ms_per_step", ",.1f" if tool in PEERS else ",.2f"),
                    _cell(values, "gpu_busy_ms", ",.1f"),
                    _cell(values, "tokens_per_s", ",.0f"),
                    _cell(values, "peak_gib", ".2f"),
                    _cell(ratio, "ratio", ".1f"),
                    _cell(ratio, "ratio_busy", ".1f"),
                ]
            )
    head = [
        *("case", "tool", "ms a step", "of that GPU-busy", "tokens/s", "GiB"),
        *("halfbyte is faster by", "by the peer's GPU-busy time"),
    ]
    return markdown(head, rows) + "\n" + source(results, name)


def goals(results: Path) -> str:
    """What was to be reached, and what was."""
    name = "gpu_vs_peers"
    found = figures(results, name)
    if not found:
        return missing(name, "python benchmarks/gpu_vs_peers.py …")

    def best(case: str, metric: str) -> float | None:
        return found.get((case, "halfbyte"), {}).get(metric)

    def ratio(case: str) -> float | None:
        """To the best peer."""
        ratios = [
            values["ratio"]
            for (of, tool), values in found.items()
            if of == case and tool.startswith("halfbyte / ") and "ratio" in values
        ]
        return min(ratios, default=None)

    free, fp16 = (best(f"tinyllama-{case}", "ms_per_step") for case in ("free", "fp16"))
    ours = best("tinyllama-tight", "peak_gib")
    theirs = found.get(("tinyllama-tight", "unsloth"), {}).get("peak_gib")
    # Of the memory, which is part of the two rows before it: a fast step that takes more is none.
    memory = ours / theirs if ours and theirs else None
    wanted: list[tuple[str, float | None, float, float, str]] = [
        ("step, memory free: ms", free, 10, 8.5, "≤"),
        ("times the best peer", ratio("tinyllama-free"), 25, 30, "≥"),
        ("step in Unsloth's memory: ms", best("tinyllama-tight", "ms_per_step"), 15, 13, "≤"),
        ("times the best peer", ratio("tinyllama-tight"), 22, 25, "≥"),
        ("its memory, times Unsloth's (for the two rows above)", memory, 1, 1, "≤"),
        (
            "packed: thousand tokens/s",
            _thousands(best("tinyllama-packed-16k", "tokens_per_s")),
            100,
            130,
            "≥",
        ),
        ("whole recipe, caches cold: s", best("recipe-cold", "wall_s"), 45, 25, "≤"),
        ("whole recipe, caches warm: s", best("recipe-warm", "wall_s"), 20, 12, "≤"),
        (
            "fp16 as on a T4, times the bf16 step",
            fp16 / free if fp16 and free else None,
            2,
            1.4,
            "≤",
        ),
    ]
    rows = [
        [
            words,
            f"{sign} {goal:g}",
            f"{sign} {aim:g}",
            "" if value is None else f"{value:.3g}",
            _verdict(value, goal, aim, sign),
        ]
        for words, value, goal, aim, sign in wanted
    ]
    return markdown(["", "to reach", "aim", "measured", ""], rows)


def _verdict(value: float | None, goal: float, aim: float, sign: str) -> str:
    if value is None:
        return "not measured"
    good = (lambda limit: value <= limit) if sign == "≤" else (lambda limit: value >= limit)
    return "aim reached" if good(aim) else "reached" if good(goal) else "**not reached**"


def _thousands(value: float | None) -> float | None:
    return None if value is None else value / 1000


def _cell(values: dict[str, float], metric: str, form: str) -> str:
    return format(values[metric], form) if metric in values else ""


TABLES: Tables = {
    "parts": parts,
    "cards": cards,
    "expected": expected,
    "before": before,
    **{f"profile-{variant}": profile(variant) for variant in VARIANTS},
    "peers": peers,
    "goals": goals,
}


def main(argv: Sequence[str] | None = None, page: Path = PAGE, tables: Tables | None = None) -> int:
    parser = argparse.ArgumentParser(description=f"The tables of {page.name}.")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if not current")
    args = parser.parse_args(argv)
    there = page.read_text(encoding="utf-8")
    made = render(there, tables=tables)
    if args.check:
        return int(made != there)
    page.write_text(made, encoding="utf-8")
    print(f"written: {page.relative_to(ROOT)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
