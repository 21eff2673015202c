"""``halfbyte report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.errors import RunError


def report(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR …]", help="Run folders; by default the latest run's."),
    ] = None,
    pdf: Annotated[bool, typer.Option("--pdf", help="Also print a PDF, with Chromium.")] = False,
    sbom: Annotated[
        bool,
        typer.Option("--sbom", help="Also list every package, its licence and hash (CycloneDX)."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of several runs: the page [comparison.html]."),
    ] = None,
) -> None:
    """Write a run's report again from its records, or lay several runs over one another."""
    from halfbyte.cli.folders import run_folder

    found = [run_folder(folder) for folder in folders] if folders else [run_folder(None)]
    bills = [_list_packages(folder) for folder in found] if sbom else []
    if len(found) > 1:
        written = _compare(found, out or Path("comparison.html"), pdf)
    elif out is not None:
        raise RunError("one run's report is written into its folder; leave out --out.")
    else:
        written = _remake(found[0], pdf)
    for path in [*written, *bills]:
        typer.echo(str(path))


def _list_packages(folder: Path) -> Path:
    from halfbyte.report.sbom import write_sbom

    return write_sbom(folder)


def _remake(folder: Path, pdf: bool) -> list[Path]:
    from halfbyte.report import make_report

    files = make_report(folder, pdf=pdf)
    return [files.markdown, files.html, *([files.pdf] if files.pdf else [])]


def _compare(folders: list[Path], out: Path, pdf: bool) -> list[Path]:
    from halfbyte.report import compare_runs
    from halfbyte.report.make import write_whole
    from halfbyte.report.pdf import print_pdf

    page = compare_runs(folders, out)
    if not pdf:
        return [page]
    printed = page.with_suffix(".pdf")
    write_whole(printed, print_pdf(page))
    return [page, printed]
