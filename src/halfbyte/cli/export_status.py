"""What an export is at, while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

    from halfbyte.finished.merging import Progress

T = TypeVar("T")


def with_status(console: Console, work: Callable[[Progress], T]) -> T:
    """What ``work`` gives; what it says of its progress is shown in a terminal."""
    if not console.is_terminal:
        return work(lambda what, done, total: None)
    with console.status("reading the model …") as status:

        def said(what: str, done: int, total: int) -> None:
            count = f" {done} of {total} tensors" if total > 1 else ""
            status.update(f"{what}{count} …")

        return work(said)
