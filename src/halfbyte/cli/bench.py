"""``halfbyte bench``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.errors import RunError

if TYPE_CHECKING:
    from rich.table import Table


def bench(
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the figures there, as JSON.")
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print the figures as one JSON object, to share.")
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Steps to time; 100 on a GPU, 10 on a CPU."),
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also time TRL + PEFT + bitsandbytes, if installed.")
    ] = False,
) -> None:
    """Measure this machine: its bandwidth, its products, and a step of a small fixed training.

    The model has random weights and is made on the spot: 1.1 billion parameters on a GPU (3 GB in
    the temporary folder), 2 million on a CPU. Nothing is downloaded and nothing is kept.
    """
    if out is not None:
        _refuse(out)
    import json

    from halfbyte.run.bench import measure

    found = measure(steps=steps, peers=peers, tell=_tell)
    text = json.dumps(found, indent=1)
    if out is not None:
        try:
            out.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise RunError(_unwritable(out, error.strerror)) from None
    if json_:
        print(text)
        return
    from halfbyte.cli.display import make_console

    make_console().print(_table(found))
    if out is not None:
        print(f"written: {out}")
    else:
        print("to share these figures: halfbyte bench --json")


def _refuse(out: Path) -> None:
    """Say what is wrong with ``out`` before minutes are spent on what is to be written there."""
    if out.is_dir():
        raise RunError(_unwritable(out, "it is a folder"))
    if not out.parent.is_dir():
        raise RunError(_unwritable(out, f"there is no folder {out.parent}"))


def _unwritable(out: Path, why: str | None) -> str:
    return f"the figures cannot be written to {out} ({why}); choose another --out."


def _tell(text: str) -> None:
    print(f"measuring {text}", file=sys.stderr)


def _table(found: dict[str, Any]) -> Table:
    from rich.table import Table

    from halfbyte.cli.units import bytes_text, count_text, duration_text, rate_text

    device, ceilings, work = found["device"], found["ceilings"], found["workload"]
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("device", f"{device['name']}, {bytes_text(device['memory_bytes'])}")
    table.add_row("copy", f"{bytes_text(ceilings['copy_bytes_per_s'])}/s read and written")
    rate = ceilings["product_flop_per_s"] / 1e9
    shown = f"{rate / 1e3:,.1f} TFLOP/s" if rate >= 1e3 else f"{rate:,.0f} GFLOP/s"
    size = ceilings["product_size"]
    table.add_row("products", f"{shown} in {found['precision']}, {size:,.0f} × {size:,.0f}")
    table.add_row(
        "work",
        f"{count_text(work['parameters'])} parameters in 4 bits, {work['tokens_per_step']:,.0f} "
        f"tokens a step in {work['batch_size']} rows, {work['steps']} steps",
    )
    for tool, of_tool in found["tools"].items():
        if "error" in of_tool:
            table.add_row(tool, of_tool["error"])
            continue
        table.add_row(
            tool,
            f"{of_tool['ms_per_step']:,.1f} ms a step, {rate_text(of_tool['tokens_per_s'])}, peak "
            f"{bytes_text(of_tool['peak_bytes'])}, ready in {duration_text(of_tool['ready_s'])}",
        )
    return table
