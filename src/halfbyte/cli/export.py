"""``halfbyte export``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.export_elsewhere import TARGETS, export_folder
from halfbyte.cli.export_status import with_status
from halfbyte.cli.options import BaseModel, DeviceName, require_device
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from rich.console import Console

    from halfbyte.export.agreement import Agreement
    from halfbyte.finished.exporting import Export
    from halfbyte.finished.merging import Progress

_MERGED = "merge the adapter (halfbyte merge DIR --out MERGED)"
# What is not written here, and how it is to be had.
_ELSEWHERE = {
    "onnx": "--to onnx is not written here, as no exporter takes this version of transformers: "
    f"{_MERGED} and run optimum-cli export onnx --model MERGED OUT in an environment of its own "
    "(docs/exporting.md).",
}
_FORMATS = ("gguf", "gguf-lora", *TARGETS, *_ELSEWHERE)


def export(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR",
            help="Run folder, adapter in PEFT's format, or merged model [the latest run].",
        ),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="gguf: the merged model, for llama.cpp and Ollama; gguf-lora: the adapter alone, "
            "for llama.cpp's --lora; mlx: a folder for MLX; gptq, awq: one for vLLM, calibrated "
            "with rows that trained.",
        ),
    ] = "gguf",
    type: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="f32, f16, bf16, q8_0, q5_0, q5_1, q4_0, q4_1; by llama.cpp itself: q4_k_m, "
            "q5_k_m, q6_k and others. By default q8_0; of gguf-lora f32, f16 or bf16, by default "
            "f32. Of mlx q4, q3, q5, q6, q8, bf16 or f16; of gptq w4a16 or w8a16; of awq w4a16.",
        ),
    ] = None,
    onto: Annotated[
        str,
        typer.Option(
            metavar="WEIGHTS",
            help="4bit: merge onto the weights that were trained; original: onto those before "
            "they were rounded to 4 bits.",
        ),
    ] = "4bit",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The file, by default NAME-TYPE.gguf; of mlx, gptq and awq the folder, by default "
            "NAME-FORMAT-TYPE.",
        ),
    ] = None,
    base: BaseModel = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Rows to check with, not the run's own; of gptq and awq, for an adapter that is "
            "no run's, rows to calibrate with as well.",
        ),
    ] = None,
    llama_quantize: Annotated[
        Path | None,
        typer.Option(metavar="PROGRAM", help="llama.cpp's llama-quantize, if not on the PATH."),
    ] = None,
    device: DeviceName = "auto",
) -> None:
    """Write a model for llama.cpp and Ollama, MLX or vLLM, and check that it is the one that was
    trained.

    Beside FILE.gguf come FILE.json, what the check found, and FILE.Modelfile for Ollama:
    ollama create NAME -f FILE.Modelfile

    In a folder for MLX or vLLM halfbyte.json says what the check found.
    """
    require_device(device)
    if onto not in ("4bit", "original"):
        raise HalfbyteError(f"--onto {onto} is none of 4bit and original.")
    if to in _ELSEWHERE:
        raise HalfbyteError(_ELSEWHERE[to])
    if to not in _FORMATS:
        raise HalfbyteError(f"--to {to} is none of {', '.join(_FORMATS)}.")
    if out is not None and out.suffix != ".gguf" and to not in TARGETS:
        raise HalfbyteError(f"--out {out} is to end in .gguf, as such files do.")
    from halfbyte.cli.display import make_console

    console = make_console()
    path = folder if folder is not None else _latest()
    if to in TARGETS:
        _silence()
        export_folder(console, path, to, type, onto, out, base, data, device, _place(path))
    elif to == "gguf-lora":
        _export_lora(console, path, type or "f32", out, base)
    else:
        _export(console, path, type or "q8_0", onto, out, base, data, llama_quantize, device)


def _latest() -> Path:
    from halfbyte.cli.folders import run_folder

    return run_folder(None)


def _export(
    console: Console,
    folder: Path,
    name: str,
    onto: str,
    out: Path | None,
    base: str | None,
    data: str | None,
    llama_quantize: Path | None,
    device: str,
) -> None:
    from halfbyte.export.disk import require_new
    from halfbyte.export.gguf.llama_cpp import find_quantizer
    from halfbyte.export.gguf.types import weight_type

    type = weight_type(name)
    quantizer = find_quantizer(llama_quantize) if type.by_llama_cpp else None
    file = out if out is not None else _file(folder, type.name)
    require_new(file)
    _silence()
    from halfbyte.finished.exportable import find_exportable
    from halfbyte.finished.exporting import export_gguf

    def exported(said: Progress) -> Export:
        return export_gguf(
            find_exportable(folder, base),
            file,
            type=type,
            onto="original" if onto == "original" else "4bit",
            quantizer=quantizer,
            device=device,
            data=data,
            progress=said,
        )

    export = with_status(console, exported)
    _print(console, export, type.name)


def _export_lora(
    console: Console, folder: Path, type: str, out: Path | None, base: str | None
) -> None:
    from halfbyte.export.disk import require_new
    from halfbyte.export.gguf.lora import TYPES

    if type.lower() not in TYPES:
        raise HalfbyteError(f"--type {type} is none of {', '.join(TYPES)}, as an adapter takes.")
    file = out if out is not None else _file(folder, f"lora-{type.lower()}")
    require_new(file)
    _silence()
    from halfbyte.cli.units import bytes_text, visible
    from halfbyte.finished.exportable import find_exportable
    from halfbyte.finished.exporting import export_lora

    alpha = export_lora(find_exportable(folder, base), file, type=type.lower())
    size = bytes_text(file.stat().st_size)
    _say(console, f"{visible(str(file))}  {size}, alpha {alpha:g}")
    _say(console, f"llama-cli -m BASE.gguf --lora {visible(str(file))}")


def _file(folder: Path, type: str) -> Path:
    return _place(folder)(f"{type}.gguf")


def _place(folder: Path) -> Callable[[str], Path]:
    """Where a file or folder of a type goes: into a run's folder where it is one, else here."""
    from halfbyte.events.log import FILE_NAME as EVENTS_FILE

    name = re.sub(r"[^A-Za-z0-9._]+", "-", folder.resolve().name).strip("-.") or "model"
    place = folder / "export" if (folder / EVENTS_FILE).exists() else Path()
    return lambda type: place / f"{name}-{type}"


def _silence() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()  # its advice is for programmers
    logging.disable_progress_bar()


def _print(console: Console, export: Export, type: str) -> None:
    from halfbyte.cli.units import bytes_text, visible

    check = export.check
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(export.written.tensors.items()))
    rows = f"{check.rows} rows of {visible(export.compared_on)}"
    lines = [
        f"{visible(str(export.file))}  {bytes_text(export.nbytes)}",
        f"tensors    {kinds}; off by {check.error:.2g} of one at most",
        f"tokens     {_tokens(check.different)} in {rows}",
        f"logits     {_logits(check.logits)} from its weights",
    ]
    if export.trained is not None:
        lines.append(f"           {_logits(export.trained)} from the adapter")
    asked = check.llama_cpp
    if asked is not None:
        lines.append(f"llama.cpp  {_tokens(asked.different)} in {rows}")
        lines.append(f"           {_logits(asked.logits)} from its weights")
    for line in lines:
        _say(console, line)
    notes = [*export.notes]
    if export.written.kept:
        count = len(export.written.kept)
        which, are = ("tensor", "is") if count == 1 else ("tensors", "are")
        notes.insert(0, f"{count} {which} whose rows fit no block of {type} {are} kept in f16")
    for note in notes:
        console.print(f"note: {visible(note)}", markup=False, highlight=False)
    for path in export.beside:
        _say(console, visible(str(path)))


def _tokens(different: int) -> str:
    return f"others in {different}" if different else "the same"


def _logits(found: Agreement) -> str:
    return f"{found.kl:.1e} nats, {found.top1:.1%} the same likeliest token,"


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
