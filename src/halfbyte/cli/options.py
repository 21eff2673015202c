"""Options that several commands have, told in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.errors import HalfbyteError

DEVICES = ("auto", "cpu", "cuda")

AdapterFolder = Annotated[
    Path | None,
    typer.Argument(
        metavar="DIR", help="Run folder, or an adapter in PEFT's format; by default the latest run."
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Base model, if it is not where the adapter says."),
]
DeviceName = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def require_device(device: str) -> None:
    """Raise HalfbyteError for what ``--device`` does not take."""
    if device not in DEVICES:
        raise HalfbyteError(f"--device {device} is none of auto, cpu and cuda.")
