"""``halfbyte combine``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from halfbyte.cli.display import Display
    from halfbyte.export.combine import Method
    from halfbyte.finished.combining import NewAdapter

METHODS = ("linear", "ties", "dare_linear", "dare_ties")
DENSITY = 0.5


def combine(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR DIR …", help="Run folders, or adapters in PEFT's format, of one base."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the adapter is written.")],
    method: Annotated[
        str,
        typer.Option("--method", metavar="METHOD", help="linear, ties, dare_linear or dare_ties."),
    ] = "linear",
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,…", help="How much of each [a mean: 1/n each, for ties 1]."),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(metavar="X", help=f"Share that ties and dare keep [{DENSITY:g}]."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="R", min=1, help="Rank of the result [linear: the sum; else the highest]."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of what dare leaves out.")] = 0,
    base: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where the base model of all of them is.")
    ] = None,
) -> None:
    """Make several adapters of one base model one adapter.

    linear adds up what they do, exactly: ranks add up too. ties keeps the largest numbers of each
    and takes the mean of those that agree in sign; dare leaves numbers out by chance and enlarges
    the rest, then adds (dare_linear) or lets signs agree (dare_ties). These make a matrix of full
    rank, of which --rank ranks are kept; how much is lost is printed. Judge the result with
    halfbyte evaluate: that the adapters were good does not say that it is.
    """
    if len(folders) < 2:
        raise HalfbyteError("combine takes two adapters or more; name their folders.")
    if method not in METHODS:
        raise HalfbyteError(f"--method {method} is none of {', '.join(METHODS)}.")
    if density is not None and method == "linear":
        raise HalfbyteError("--density is for ties and dare: linear leaves nothing out.")
    if density is not None and not 0.0 < density <= 1.0:
        raise HalfbyteError(f"--density {density:g} is no share above 0 and up to 1.")
    numbers = None if weights is None else _weights(weights, len(folders))
    from halfbyte.export.disk import require_new

    require_new(out)
    from halfbyte.cli.display import Display
    from halfbyte.events.types import PhaseProgress

    display = Display()
    try:
        with display.phase("combining"):
            from transformers.utils import logging

            from halfbyte.finished.combining import combine_adapters
            from halfbyte.finished.found import find_adapter

            logging.set_verbosity_error()  # its advice is for programmers
            made = combine_adapters(
                [find_adapter(folder, base) for folder in folders],
                out,
                method=cast("Method", method),
                weights=numbers,
                density=DENSITY if density is None else density,
                rank=rank,
                seed=seed,
                progress=lambda n, of: display(PhaseProgress("combining", n, of, "layers")),
            )
        show_adapter(display, made)
    finally:
        display.close()


def _weights(text: str, count: int) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise HalfbyteError(f"--weights {text} are no numbers with commas between, as 0.7,0.3.")
    if len(found) != count:
        raise HalfbyteError(f"--weights has {len(found)} numbers for {count} adapters.")
    return found


def show_adapter(display: Display, made: NewAdapter) -> None:
    """Of what ranks it is, and what was lost on the way."""
    from halfbyte.cli.blocks import Block
    from halfbyte.cli.units import bytes_text

    before = [_ranks_text(ranks) for ranks in made.ranks_before]
    lines = [
        f"{' and '.join(before)} → {_ranks_text(made.ranks)}, {len(made.ranks):,} layers, "
        f"{bytes_text(made.nbytes)}"
    ]
    display.block(Block("rank", lines))
    errors = made.errors
    if errors is None:
        lost = ["nothing: the ranks stand side by side"]
    else:
        lost = [
            f"{errors.whole:.2%} of all layers together (relative, in the Frobenius norm)",
            f"{errors.mean:.2%} of a layer in the mean, {errors.largest:.2%} at most: "
            f"{errors.layer}",
        ]
    display.block(Block("lost", lost))
    display.whole_line("adapter", str(made.folder))


def _ranks_text(ranks: dict[str, int]) -> str:
    least, most = min(ranks.values()), max(ranks.values())
    return f"{least}" if least == most else f"{least} to {most}"
