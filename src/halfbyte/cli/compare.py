"""``halfbyte compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.options import BaseModel, DeviceName, require_device
from halfbyte.errors import HalfbyteError, RunError

if TYPE_CHECKING:
    from halfbyte.finished.comparing import Place, Wanted
    from halfbyte.report.side_by_side import SideBySide


def compare(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="DIR …",
            help="Run folders, or adapters in PEFT's format; by default the latest run.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts: paragraphs of a text, or lines of a JSONL."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows in the format of the first adapter.")
    ] = None,
    rows: Annotated[
        int, typer.Option(metavar="N", min=1, help="Prompts at most; the seed draws them.")
    ] = 8,
    variants: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Of each DIR: base, adapter, step-N or all, with commas between. By default all "
            "of one, and the adapters of several.",
        ),
    ] = "",
    blind: Annotated[
        bool, typer.Option("--blind", help="Choose the better answer without knowing whose it is.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Longest answer in tokens.")
    ] = 256,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Of the prompts that are drawn, and the sides.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="The page [of one run: in its folder evaluation/]."),
    ] = None,
    base: BaseModel = None,
    device: DeviceName = "auto",
) -> None:
    """Lay answers to the same prompts side by side: of base, checkpoints and adapter, or of several
    adapters.

    With --blind they are shown in pairs, without names, and you choose.
    """
    require_device(device)
    if prompts is not None and data is not None:
        raise HalfbyteError("--prompts and --data both say what is asked; leave one out.")
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise HalfbyteError(f"--out {out} is to be a page, so its name must end in .html.")
    from transformers.utils import logging

    from halfbyte.finished.comparing import Wanted, find_places
    from halfbyte.run.folder import latest_run

    logging.set_verbosity_error()
    named = tuple(name.strip() for name in variants.split(",") if name.strip())
    wanted = Wanted(
        folders=folders or [latest_run()],
        variants=named or (("base", "adapter") if blind and len(folders or []) < 2 else ()),
        prompts=prompts,
        data=data,
        rows=rows,
        seed=seed,
        max_new_tokens=max_new_tokens,
        base=base,
        device=device,
    )
    places = find_places(wanted)
    page = _page(places, out)
    if blind:
        from halfbyte.cli.blind import blind_trial

        blind_trial(wanted, places, page.parent)
        return
    _lay_out(wanted, places, page)


def _page(places: list[Place], out: Path | None) -> Path:
    """Where the page is written; what cannot be is told before a model is loaded."""
    from halfbyte.finished.judged_files import require_writable
    from halfbyte.report.side_by_side import FOLDER, PAGE

    run = _one_run(places)
    folder = Path(FOLDER) if run is None else run / FOLDER
    page = folder / PAGE if out is None else out
    if run is not None:
        if folder.is_symlink():  # in a folder of somebody else's it may lead anywhere
            raise RunError(f"{folder} is a link to another folder; remove it.")
        require_writable(folder)
    require_writable(page.parent)
    return page


def _one_run(places: list[Place]) -> Path | None:
    return places[0].found.run if len(places) == 1 else None


def _lay_out(wanted: Wanted, places: list[Place], page: Path) -> None:
    from halfbyte.cli.compare_terminal import doing, print_answers
    from halfbyte.cli.display import make_console
    from halfbyte.finished.comparing import compare as answer_all

    console = make_console()
    with doing(console) as (on_phase, on_fallback):
        seen = answer_all(wanted, places, on_phase=on_phase, on_fallback=on_fallback)
    print_answers(console, seen)
    for path in _write(seen, page, _one_run(places)):
        typer.echo(str(path))


def _write(seen: SideBySide, page: Path, run: Path | None) -> list[Path]:
    """The page and the record beside it; of a run the record in its folder, and its report."""
    from halfbyte.report import make_report
    from halfbyte.report.make import write_whole
    from halfbyte.report.side_by_side import FOLDER, RECORD, to_json
    from halfbyte.report.side_by_side_page import side_by_side_page

    record = to_json(seen).encode()
    written = [page, page.with_suffix(".json")]
    write_whole(page, side_by_side_page(seen).encode())
    write_whole(written[1], record)
    if run is None:
        return written
    kept = run / FOLDER / RECORD
    if kept != written[1]:
        write_whole(kept, record)
        written.append(kept)
    return [*written, make_report(run).html]
