"""``halfbyte doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.errors import USER_ERROR

if TYPE_CHECKING:
    from halfbyte.cli.doctor_findings import Finding

_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


def doctor(
    network: Annotated[
        bool, typer.Option("--network", help="Also see whether the model hub can be reached.")
    ] = False,
) -> None:
    """Say what of this machine will be used, what is missing, and what to do about it.

    The exit code is 0 unless something makes training impossible.
    """
    from halfbyte.cli.doctor_facts import gather, read_packages
    from halfbyte.cli.doctor_findings import judge, judge_packages

    try:
        findings = judge(gather(network=network))
    except ImportError:
        # A package that looking itself needs is not there: say which, if that is why.
        findings = judge_packages(read_packages())
        if not any(finding.blocks for finding in findings):
            raise
    _show(findings)
    if any(finding.blocks for finding in findings):
        raise typer.Exit(USER_ERROR)


def _show(findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    from halfbyte.cli.display import make_console

    console = make_console()
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        text = Text(finding.text)
        if finding.do:
            text.append(f"\n→ {finding.do}", style="bold" if finding.level == "problem" else "")
        level = Text(finding.level, style=_STYLES[finding.level])
        table.add_row(level, finding.about, text)
    console.print(table)
    console.print()
    console.print(_sum(findings))


def _sum(findings: list[Finding]) -> str:
    """The last line: whether one can train."""
    problems = sum(finding.level == "problem" for finding in findings)
    if any(finding.blocks for finding in findings):
        return "halfbyte cannot train here until that is mended."
    if problems:
        return (
            f"halfbyte can train here, with {problems} problem{'s' if problems > 1 else ''} above."
        )
    return "halfbyte can train here. Begin with: halfbyte demo"
