"""``halfbyte data``."""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.errors import FOUND_ERRORS
from halfbyte.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from halfbyte.cli.display import Display
    from halfbyte.run.look import Look

ROWS_SHOWN, ROWS_ON_PAGE = 3, 20


def data(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="Whose data to look at.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: lora.r=8. Repeatable."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page with each row's tokens.")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help=f"Rows to show as trained [{ROWS_SHOWN}, on the page {ROWS_ON_PAGE}].",
        ),
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the rows that train, cleaned, as JSONL."),
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, for programs.")
    ] = False,
) -> None:
    """Show what training will see, and what is wrong with it. No weights and no GPU are needed.

    The exit code is 1 if there is an error that the recipe does not accept (data.accept).
    """
    options = {"--html": html, "--write": write}
    _refuse_to_replace(options, [recipe])
    from halfbyte.cli.asked import asked_for
    from halfbyte.cli.display import Display

    asked = asked_for(recipe, overrides=set_ or [])
    display = Display()
    with nullcontext() if json_ else display.phase("looking"):
        from halfbyte.events.types import PhaseProgress
        from halfbyte.run.look import look_at_data

        look = look_at_data(
            asked.recipe,
            recipe_folder=asked.folder,
            progress=lambda done, rows: display(PhaseProgress("looking", done, rows)),
        )
    _refuse_to_replace(options, look.files)
    if json_:
        from halfbyte.cli.data_json import data_json

        typer.echo(data_json(look, ROWS_SHOWN if rows is None else rows))
    else:
        _show(display, look, ROWS_SHOWN if rows is None else rows)
    written = _write_files(look, recipe.name, html, write, ROWS_ON_PAGE if rows is None else rows)
    if not json_:
        for label, path in written:
            display.whole_line(label, path)
    if any(finding.stops for finding in look.prepared.findings):
        raise typer.Exit(FOUND_ERRORS)


def _refuse_to_replace(options: dict[str, Path | None], read: Sequence[Path]) -> None:
    """Raises RunError where what is to be written would replace what was read."""
    for option, path in options.items():
        if path is None or not path.exists():
            continue
        if any(source.exists() and path.samefile(source) for source in read):
            raise RunError(f"{option} {path} would replace what is read; name another file.")


def _show(display: Display, look: Look, rows: int) -> None:
    from dataclasses import replace

    from halfbyte.cli.blocks import Block, row_text, sample_legend
    from halfbyte.cli.data_blocks import histogram_block, in_all
    from halfbyte.data.audit.sample import runs_of
    from halfbyte.data.example import counted

    prepared = look.prepared
    display.block(Block("model", [look.recipe.model.name]))
    display(replace(prepared.audit, source=look.source, sample=[]))
    if prepared.funnel is not None:
        display(prepared.funnel)
    for choice in prepared.choices:
        display(choice)
    display.flush()
    display.block(histogram_block(look.lengths(), prepared.max_length))
    for number, row in enumerate(look.rows(rows)):
        if number == 0:
            display.block(Block("rows", [sample_legend(colour=display.colour)]))
        text = row_text(runs_of(row.pieces), colour=display.colour)
        display.block(Block(f"row {counted(row.row, row.source)}", list(text.split("\n"))), "dim")
    display.line()
    for warning in prepared.warnings:
        display.block(Block("warning", [warning]), "bold yellow")
    for finding in reversed(prepared.findings):  # the gravest last, where one reads first
        display(finding)
    display.block(Block("found", [in_all(prepared.findings)]))


def _write_files(
    look: Look, name: str, html: Path | None, write: Path | None, rows: int
) -> list[tuple[str, str]]:
    """Write what was asked for; returns what it is and where, for the screen."""
    written = []
    if html is not None:
        from halfbyte.report.make import write_whole

        write_whole(html, _page(look, name, rows).encode())
        written.append(("page", str(html)))
    if write is not None:
        from dataclasses import replace

        from halfbyte.data.cleaning import write_cleaned

        # A row that the recipe takes more than once, or that became several, is written once;
        # the last of several holds the others.
        same = groupby(look.prepared.train_rows, key=lambda row: (row.source, row.row))
        last = (deque(rows, maxlen=1)[0] for _, rows in same)
        count = write_cleaned(write, (replace(row, turns=None) for row in last))
        written.append(("written", f"{count:,} rows to {write}"))
    return written


def _page(look: Look, name: str, rows: int) -> str:
    from dataclasses import replace

    from halfbyte.report.data_page import DataSeen, data_page

    prepared = look.prepared
    return data_page(
        DataSeen(
            name=name,
            model=look.recipe.model.name,
            audit=replace(prepared.audit, source=look.source),
            findings=prepared.findings,
            warnings=prepared.warnings,
            choices=prepared.choices,
            funnel=prepared.funnel,
            lengths=look.lengths(),
            rows=look.rows(rows),
        )
    )
