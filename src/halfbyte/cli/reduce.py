"""``halfbyte reduce``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.options import AdapterFolder, BaseModel
from halfbyte.errors import HalfbyteError


def reduce(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the adapter is written.")],
    folder: AdapterFolder = None,
    rank: Annotated[
        int | None, typer.Option(metavar="R", min=1, help="Rank of each layer, at most.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(metavar="X", help="Share to keep of the squared singular values: 0.99."),
    ] = None,
    base: BaseModel = None,
) -> None:
    """Give an adapter a lower rank.

    Of each layer's B·A the largest singular values are kept, which is the nearest matrix of that
    rank: as many as --rank says, or as few as hold the share --energy. What is lost is printed.
    """
    if (rank is None) == (energy is None):
        raise HalfbyteError("say either --rank R or --energy X, as --energy 0.99.")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise HalfbyteError(f"--energy {energy:g} is no share above 0 and up to 1.")
    from halfbyte.export.disk import require_new

    require_new(out)
    from halfbyte.cli.combine import show_adapter
    from halfbyte.cli.display import Display
    from halfbyte.events.types import PhaseProgress
    from halfbyte.run.folder import latest_run

    named = folder or latest_run()
    display = Display()
    try:
        with display.phase("reducing"):
            from transformers.utils import logging

            from halfbyte.finished.combining import reduce_adapter
            from halfbyte.finished.found import find_adapter

            logging.set_verbosity_error()  # its advice is for programmers
            made = reduce_adapter(
                find_adapter(named, base),
                out,
                rank=rank,
                energy=energy,
                progress=lambda n, of: display(PhaseProgress("reducing", n, of, "layers")),
            )
        show_adapter(display, made)
    finally:
        display.close()
