"""Answers of several models in a terminal, and what is being done until they are there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from halfbyte.cli.units import visible
from halfbyte.report.side_by_side import SideBySide, ending

Tell = Callable[[str], None]


@contextmanager
def doing(console: Console) -> Iterator[tuple[Tell, Tell]]:
    """Two listeners: of what is being done, and of what could not be done as it should be."""

    def on_fallback(reason: str) -> None:
        print(f"halfbyte: tokens are made without a CUDA graph: {visible(reason)}", file=sys.stderr)

    if not console.is_terminal:
        yield lambda _: None, on_fallback
        return
    with console.status("reading the adapter …") as status:
        yield lambda text: status.update(Text(f"{visible(text)} …")), on_fallback


def print_answers(console: Console, seen: SideBySide) -> None:
    """Each prompt, and the answers to it one below the other."""
    for asked in seen.asked:
        console.print(Text(visible(asked.title), "bold cyan"))
        _print_text(console, asked.question)
        for column, answer in zip(seen.columns, asked.answers, strict=True):
            head = Text(visible(column.name), "bold green")
            head.append(visible(ending(answer)).replace("\u00a0", " "), "dim")
            console.print(head)
            _print_text(console, answer.text)
        if asked.reference is not None:
            console.print(Text("reference", "bold"))
            _print_text(console, asked.reference)
        console.print()


def _print_text(console: Console, text: str) -> None:
    shown = Text(visible(text.strip("\n")).expandtabs(4))
    if console.is_terminal:
        console.print(Padding(shown, (0, 0, 0, 2)))
    else:
        for line in shown.plain.split("\n"):
            console.print(Text(f"  {line}"), soft_wrap=True)
