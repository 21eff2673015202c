"""The figures of an evaluation in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from halfbyte.cli.units import visible
from halfbyte.evaluate.figure_text import (
    GROUPS,
    LOOKS,
    chance_text,
    difference_text,
    look_text,
    value_text,
)
from halfbyte.evaluate.results import Figure, Results

_LABEL = 10
_NAME = 18


def print_results(console: Console, results: Results, written: Sequence[Path]) -> None:
    """All that a person wants to know first, in 80 columns; then where the rest lies."""
    _print_about(console, results)
    for group, title in GROUPS.items():
        figures = [figure for figure in results.figures if figure.group == group]
        if figures:
            console.print()
            console.print(_figures(title, figures))
    if results.wins:
        console.print()
        console.print(_wins(results))
    if results.looks:
        console.print()
        console.print(_looks(results))
    console.print()
    for note in results.notes:
        console.print(Text(visible(f"{note[:1].upper()}{note[1:]}"), "dim"))
    if len(results.figures) > 1:
        text = (
            "In brackets: 95 % intervals, by resampling the rows. Real: chance alone gives such a "
            "difference less than once in twenty times."
        )
        console.print(Text(text, "dim"))
    for path in written:
        console.print(
            Text.assemble((f"{'written':<{_LABEL}}", "bold"), visible(str(path))), soft_wrap=True
        )


def _print_about(console: Console, results: Results) -> None:
    about = results.about
    held_out = " held-out" if about.get("held_out") else ""
    count = about.get("rows")
    rows = f"{count:,}{held_out} {'row' if count == 1 else 'rows'} of {about.get('data')}"
    if about.get("questions"):
        rows += f", {about.get('questions'):,} questions with choices"
    lines = (
        ("adapter", str(about.get("adapter"))),
        ("base", f"{about.get('base')}, in 4 bits, without the adapter"),
        ("judged by", rows),
    )
    console.print()
    for label, text in lines:
        console.print(Text.assemble((f"{label:<{_LABEL}}", "bold"), visible(text)), soft_wrap=True)


def _figures(title: str, figures: Sequence[Figure]) -> Table:
    table = _table()
    table.add_column(title, min_width=_NAME, no_wrap=True)
    table.add_column("base", justify="right", no_wrap=True, min_width=7)
    table.add_column("adapter", justify="right", no_wrap=True, min_width=7)
    table.add_column("difference, 95 %", justify="right", no_wrap=True, min_width=23)
    table.add_column("")
    for figure in figures:
        style = {True: "green", False: "red", None: "dim"}[figure.better]
        table.add_row(
            visible(figure.name),
            value_text(figure, figure.base.value),
            Text(value_text(figure, figure.adapter.value), "bold"),
            difference_text(figure),
            Text(chance_text(figure), style),
        )
    return table


def _wins(results: Results) -> Table:
    table = _table()
    table.add_column("rows won by", min_width=_NAME, no_wrap=True)
    for name in ("base", "adapter", "ties"):
        table.add_column(name, justify="right", min_width=7)
    for wins in results.wins:
        table.add_row(visible(wins.name), f"{wins.base:,}", f"{wins.adapter:,}", f"{wins.ties:,}")
    return table


def _looks(results: Results) -> Table:
    table = _table()
    table.add_column("the answers", min_width=_NAME, no_wrap=True)
    for name in results.looks:
        table.add_column(visible(name), justify="right", min_width=7)
    for key, name in LOOKS.items():
        values = [looks.get(key) for looks in results.looks.values()]
        if any(values):  # what none of them has is left out
            table.add_row(name, *(look_text(key, value) for value in values))
    return table


def _table() -> Table:
    return Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
