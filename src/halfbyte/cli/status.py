"""``halfbyte status``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from halfbyte.run.status import Status


def status(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Run folder; by default the latest run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line for a program.")] = False,
) -> None:
    """Say whether a run goes on, hangs, has ended or was cut off.

    The exit code is 1 where somebody has to look after it: it hangs, was cut off, or was stopped.
    """
    from halfbyte.cli.errors import FOUND_ERRORS
    from halfbyte.run.folder import latest_run
    from halfbyte.run.status import as_json as json_line
    from halfbyte.run.status import run_status

    path = latest_run() if folder is None else folder
    found = run_status(path)
    typer.echo(json_line(found) if as_json else status_text(path, found))
    if found.needs_somebody:
        raise typer.Exit(FOUND_ERRORS)


def status_text(folder: Path, found: Status) -> str:
    """The status in a sentence."""
    from halfbyte.cli.summary import resume_command
    from halfbyte.cli.units import duration_text, visible

    of = "" if found.steps is None else f" of {found.steps:,}"
    at = f"step {found.step:,}{of}"
    doing = f", doing {found.doing}" if found.doing else ""
    go_on = f"go on with {resume_command(folder)}"
    match found.state:
        case "starting":
            text = f"starting: its process lives, and has written no record yet{doing}"
            if found.doing:
                text += f"; it has got no further for {duration_text(found.no_further)}"
        case "running":
            text = f"running: {at}{doing}; recorded {duration_text(found.silent)} ago"
        case "stalled":
            text = (
                f"stalled: its process lives, but has got no further for "
                f"{duration_text(found.no_further)} after {at}{doing}; stop it and {go_on}"
            )
        case "finished":
            text = f"finished after {at}"
        case "interrupted":
            text = f"interrupted ({found.reason}) after {at}; {go_on}"
        case "stopped":
            text = f"stopped at {at}, since {found.reason}"
        case _:
            text = f"dead: its process ended in the middle, after {at}; {go_on}"
    return visible(f"{text}.")
