"""``halfbyte demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run folder; by default runs/demo-<date>-<n>."),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Train for so many steps at most.")
    ] = None,
) -> None:
    """Fine-tune a small real model on the rows that come with halfbyte: no account, no GPU needed.

    It takes a few minutes on two cores, shows answers before and after, and says what to type
    next.
    """
    from halfbyte.cli.asked import asked_for
    from halfbyte.cli.train import start

    start(
        asked_for(demo_recipe()),
        out=out,
        max_steps=max_steps,
        overwrite=False,
        answers=2,
        hints=["halfbyte init my.csv    the same with your own rows: questions and answers"],
    )


def demo_recipe() -> Path:
    """The recipe that is shipped in the package; its rows lie beside it."""
    return Path(__file__).resolve().parent.parent / "demo" / "demo.yaml"
