"""``halfbyte export --to mlx``, ``gptq`` and ``awq``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli.export_status import with_status

if TYPE_CHECKING:
    from rich.console import Console

    from halfbyte.finished.exporting_elsewhere import ElsewhereExport
    from halfbyte.finished.merging import Progress

TARGETS = ("mlx", "gptq", "awq")
# How a folder is tried, by the program that such folders are for.
_USE = {
    "mlx": "mlx_lm.chat --model {}",
    "gptq": "vllm serve {}",
    "awq": "vllm serve {}",
}


def export_folder(
    console: Console,
    folder: Path,
    to: str,
    name: str | None,
    onto: str,
    out: Path | None,
    base: str | None,
    data: str | None,
    device: str,
    default: Callable[[str], Path],
) -> None:
    """``default`` says what a folder is called by its format and type."""
    from halfbyte.export.disk import require_new
    from halfbyte.export.elsewhere import types

    target = types.TARGETS[to]
    type = target.weight_type(name)
    place = out if out is not None else default(f"{to}-{type.name}")
    require_new(place)
    from halfbyte.export.elsewhere.workers import find_workshop
    from halfbyte.plan.device import find_device

    workshop = find_workshop(target, find_device(device))
    from halfbyte.finished.exportable import find_exportable
    from halfbyte.finished.exporting_elsewhere import export_elsewhere

    def exported(said: Progress) -> ElsewhereExport:
        return export_elsewhere(
            find_exportable(folder, base),
            place,
            workshop=workshop,
            type=type,
            onto="original" if onto == "original" else "4bit",
            device=device,
            data=data,
            progress=said,
        )

    export = with_status(console, exported)
    _print(console, export, to)


def _print(console: Console, export: ElsewhereExport, to: str) -> None:
    from halfbyte.cli.units import bytes_text, visible

    check = export.check
    matrices = f"{check.quantized} of {check.quantized + len(check.kept)}"
    groups = f", {matrices} matrices in groups of {export.group}" if export.group else ""
    tokens = f"others in {check.different}" if check.different else "the same"
    lines = [f"{visible(str(export.folder))}  {bytes_text(export.nbytes)}{groups}"]
    if export.calibrated:
        lines.append(f"calibrated with {export.calibrated} rows that are none of those below")
    lines.append(f"tokens     {tokens} in {check.rows} rows of {visible(export.compared_on)}")
    lines.append(
        f"logits     {check.logits.kl:.1e} nats, {check.logits.top1:.1%} the same likeliest token, "
        "from its weights in fp32"
    )
    merged = export.merged
    if merged is not None:
        lines.append(
            f"           {merged.kl:.1e} nats, {merged.top1:.1%} the same likeliest token, these "
            "from the adapter"
        )
    lines += [f"note: {visible(note)}" for note in export.notes]
    lines.append(_USE[to].format(visible(str(export.folder))))
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
