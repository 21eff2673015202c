"""``halfbyte merge``."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.options import AdapterFolder, BaseModel, DeviceName, require_device
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from halfbyte.cli.display import Display
    from halfbyte.export.agreement import Agreement
    from halfbyte.finished.merging import Merge

_ONTO = ("4bit", "original")
_TYPES = ("bf16", "fp16", "fp32")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def merge(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the model is written.")],
    folder: AdapterFolder = None,
    onto: Annotated[
        str, typer.Option(metavar="4bit|original", help="The weights the adapter is added to.")
    ] = "4bit",
    dtype: Annotated[str, typer.Option(metavar="bf16|fp16|fp32", help="Type of the weights.")] = (
        "bf16"
    ),
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest file.")] = "5GB",
    base: BaseModel = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Rows to compare both on [the run's held-out rows]."),
    ] = None,
    device: DeviceName = "auto",
) -> None:
    """Write base model and adapter as one model, in transformers' format.

    An adapter learns beside weights that are rounded to 4 bits, and makes good some of what
    rounding lost. --onto 4bit adds it to those: the merged model answers as the trained one did.
    --onto original adds it to the base's own weights, which are nearer to the base model and are
    not what was trained; how far that model is from the trained one is measured and printed.

    The written model is read again and compared with the adapter before the folder gets its name.
    Beside it lies merge.json with what was measured.
    """
    if onto not in _ONTO:
        raise HalfbyteError(f"--onto {onto} is neither 4bit nor original.")
    if dtype not in _TYPES:
        raise HalfbyteError(f"--dtype {dtype} is none of bf16, fp16 and fp32.")
    require_device(device)
    size = size_of(shard_size)
    from halfbyte.export.disk import require_new

    require_new(out)
    from halfbyte.cli.display import Display

    display = Display()
    try:
        _show(display, _merge(display, folder, out, onto, dtype, size, base, data, device))
    finally:
        display.close()


def size_of(text: str) -> int:
    """The bytes of a size as it is typed: 500MB, 5GB. Raises HalfbyteError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", text.strip(), re.IGNORECASE)
    size = float(found[1]) * _UNITS[found[2].upper()] if found else 0.0
    if not 1e3 <= size < 1e15:
        raise HalfbyteError(f"--shard-size {text} is no size like 5GB or 500MB.")
    return int(size)


def _merge(
    display: Display,
    folder: Path | None,
    out: Path,
    onto: str,
    dtype: str,
    size: int,
    base: str | None,
    data: str | None,
    device: str,
) -> Merge:
    from halfbyte.run.folder import latest_run

    named = folder or latest_run()
    with display.phase("opening"):
        from transformers.utils import logging

        from halfbyte.finished.found import find_adapter
        from halfbyte.finished.merging import merge_adapter
        from halfbyte.run.precision import DTYPES

        logging.set_verbosity_error()  # its advice is for programmers
        found = find_adapter(named, base)
    phases = _Phases(display)
    merge = merge_adapter(
        found,
        out,
        onto="4bit" if onto == "4bit" else "original",
        dtype=DTYPES[dtype],
        shard_bytes=size,
        device=device,
        data=data,
        progress=phases,
    )
    phases.end()
    return merge


class _Phases:
    """Shows what goes on, one after another."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._name: str | None = None
        self._began = 0.0

    def __call__(self, name: str, done: int, total: int) -> None:
        from halfbyte.events.types import PhaseProgress, PhaseStarted

        if name != self._name:
            self.end()
            self._name, self._began = name, time.perf_counter()
            self._display(PhaseStarted(name))
        self._display(PhaseProgress(name, done, total, "tensors"))

    def end(self) -> None:
        from halfbyte.events.types import Phase

        if self._name is not None:
            self._display(Phase(self._name, time.perf_counter() - self._began))
        self._name = None


def _show(display: Display, merge: Merge) -> None:
    from halfbyte.cli.blocks import Block
    from halfbyte.cli.units import bytes_text
    from halfbyte.events.types import Fallback, Warned
    from halfbyte.finished.merging import type_name

    compared, check = merge.compared, merge.check
    if compared.fallback is not None:
        display(Fallback("compared on texts that halfbyte brings", compared.fallback.rstrip(".")))
    if merge.warning is not None:
        display(Warned(merge.warning))
    files = f"{merge.files} files" if merge.files > 1 else "1 file"
    if merge.onto == "4bit":
        onto = "the weights rounded to 4 bits, beside which the adapter was trained"
    else:
        onto = "the base's original weights; the adapter was trained beside rounded ones"
    display.block(Block("merged onto", [onto]))
    display.block(
        Block("weights", [f"{type_name(merge.dtype)}, {bytes_text(merge.nbytes)} in {files}"])
    )
    logits, tensors = check.logits, check.tensors
    lines = [
        f"{tensors.compared:,} tensors; no layer's outputs are off by more than "
        f"{tensors.error:.1e}, and {tensors.least:.1%} to {tensors.most:.1%} of the adapter is "
        f"there in {tensors.seen:,} of {tensors.adapted:,} layers"
        + (" (in the others it does less than rounding)" if tensors.seen < tensors.adapted else ""),
        f"logits of {logits.positions:,} tokens in {len(compared.rows)} rows of {compared.source}:",
        f"{'':<22}{'KL, nats':>10}{'same token':>12}{'off by':>10}{'at most':>10}",
        _agreement("merged, adapter", logits),
        *([] if check.trained is None else [_agreement("merged, 4-bit model", check.trained)]),
        _agreement("adapter, base alone", check.base),
    ]
    display.block(Block("compared", lines))
    display.whole_line("model", str(merge.folder))


def _agreement(what: str, found: Agreement) -> str:
    return (
        f"{what:<22}{found.kl:>10.1e}{found.top1:>12.1%}{found.mean:>10.1e}{found.largest:>10.1e}"
    )
