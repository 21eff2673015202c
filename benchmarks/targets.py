"""What each form of a finished adapter gives back, loaded by the programs that it is for.

    python benchmarks/targets.py RUN [--rows N] [--only NAMES] [--made FOLDER] [--write]

``halfbyte merge``, ``export`` and ``reduce`` write every target of the run in RUN; PEFT,
transformers and, where a Python has its binding (HALFBYTE_LLAMA_PYTHON), llama.cpp load them, all
in fp32; so do mlx-lm and llmcompressor where there is one that has them (HALFBYTE_MLX_PYTHON,
HALFBYTE_COMPRESSOR_PYTHON), in 16 bits. Their logits on held-out rows are compared with those of
the adapter as halfbyte opens it, base in 4 bits. What is made onto the original weights is compared
with the adapter on those. The tokens of the rows' texts must be those that were trained.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.data.batching import make_batch
from halfbyte.errors import ModelError
from halfbyte.evaluate.original_weights import original_weights
from halfbyte.export.agreement import Agreement, compare_logits
from halfbyte.export.elsewhere.types import TARGETS
from halfbyte.export.elsewhere.workers import find_workshop
from halfbyte.export.gguf.llama_cpp import ask_llama_cpp, find_python
from halfbyte.finished.found import find_adapter
from halfbyte.finished.opened import OpenedAdapter, open_adapter
from halfbyte.finished.rows import HeldOut, held_out_rows
from halfbyte.plan.device import find_device
from record import write_results

LONGEST = 128  # tokens of a row
# What other packages write and load; they multiply in 16 bits.
FOLDERS = (
    ("mlx", "bf16"),
    ("mlx", "q8"),
    ("mlx", "q4"),
    ("gptq", "w8a16"),
    ("gptq", "w4a16"),
    ("awq", "w4a16"),
)
ADAPTER, ORIGINAL = "adapter on 4 bits", "adapter on original weights"


@dataclass(frozen=True)
class Shown:
    """Rows as ids, and the texts that they were made of (None where a row was cut)."""

    ids: list[list[int]]
    texts: list[str]
    tokens: list[list[int]]  # of the texts, as trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Plain)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--only", default="", help="targets whose names begin so, with commas")
    parser.add_argument("--made", type=Path, help="what other packages wrote, kept")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results/")
    asked = parser.parse_args()
    only = tuple(part.strip() for part in asked.only.split(","))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(asked.run, asked.rows, Path(folder), only, asked.made):
            rows.append(row)
            if asked.write:  # each time: all of it takes a quarter of an hour
                write_results("targets", [line for one in rows for line in one.lines()])
    print(f"{'target':34} {'loaded by':14} {'largest':>9} {'mean':>9} {'KL':>9} {'top 1':>7}")
    for row in rows:
        found = row.agreement
        print(
            f"{row.target:34} {row.program:14} {found.largest:9.2g} {found.mean:9.2g} "
            f"{found.kl:9.2g} {found.top1:7.1%}  tokens {row.tokens}"
        )


class _Plain(argparse.RawDescriptionHelpFormatter):
    pass


@dataclass(frozen=True)
class Row:
    """A target, who loaded it, and how near it came."""

    target: str
    program: str
    against: str
    agreement: Agreement
    tokens: str  # "equal", or how many texts differ; "–" where the target brings none

    def lines(self) -> Iterable[dict[str, Any]]:
        case = f"{self.target} | {self.against} | {self.tokens}"
        units = {"positions": "", "largest": "logits", "mean": "logits", "kl": "nats", "top1": ""}
        for metric, value in asdict(self.agreement).items():
            yield {
                "case": case,
                "tool": self.program,
                "metric": metric,
                "value": value,
                "unit": units[metric],
            }


def measure(
    run: Path, count: int, folder: Path, only: tuple[str, ...], made: Path | None
) -> Iterable[Row]:
    opened = _in_fp32(run)
    held_out = held_out_rows(opened.found, opened.source, limit=count)
    shown = _shown(opened, held_out)
    ours = {ADAPTER: _logits(opened, shown.ids)}
    if any("merged onto original".startswith(o[:20]) or "GGUF LoRA".startswith(o) for o in only):
        with original_weights(opened.qlora, opened.source.read):
            ours[ORIGINAL] = _logits(opened, shown.ids)

    def row(target: str, program: str, logits: Sequence[Tensor], tokens: str, to: str) -> Row:
        return Row(target, program, to, compare_logits(logits, ours[to]), tokens)

    if "adapter".startswith(only):
        yield row("adapter", "PEFT", _by_peft(opened, run / "adapter", shown.ids), "–", ADAPTER)
    if (name := "adapter, reduced to energy 0.9999").startswith(only):
        small = folder / "reduced"
        halfbyte("reduce", run, "--energy", "0.9999", "--out", small)
        yield row(name, "PEFT", _by_peft(opened, small, shown.ids), "–", ADAPTER)
    for onto, to in (("4bit", ADAPTER), ("original", ORIGINAL)):
        for dtype in ("bf16", "fp32"):
            if not f"merged onto {onto}, {dtype}".startswith(only):
                continue
            out = folder / f"merged-{onto}-{dtype}"
            halfbyte("merge", run, "--onto", onto, "--dtype", dtype, "--out", out)
            logits, tokens = _by_transformers(out, shown)
            yield row(f"merged onto {onto}, {dtype}", "transformers", logits, tokens, to)
            if onto == "original" and dtype == "fp32":
                yield row(f"merged onto {onto}, {dtype}", "transformers", logits, tokens, ADAPTER)
    python = find_python()
    types = ["f32", "f16", "q8_0", *(["q6_k", "q5_k_m", "q4_k_m"] if python else []), "q4_0"]
    for kind in types:
        if not f"GGUF {kind}".startswith(only):
            continue
        file = folder / f"{kind}.gguf"
        halfbyte("export", run, "--to", "gguf", "--type", kind, "--out", file)
        logits, tokens = _by_transformers(folder, shown, file.name)
        yield row(f"GGUF {kind}", "transformers", logits, tokens, ADAPTER)
        if python:
            logits, tokens = _by_llama_cpp(python, file, shown)
            yield row(f"GGUF {kind}", "llama.cpp", logits, tokens, ADAPTER)
        file.unlink()
    if python and "GGUF LoRA".startswith(only):
        base, lora = folder / "base.gguf", folder / "lora.gguf"
        _base_gguf(opened, base)
        halfbyte("export", run, "--to", "gguf-lora", "--out", lora)
        logits, tokens = _by_llama_cpp(python, base, shown, lora)
        yield row("GGUF LoRA on the base in f32", "llama.cpp", logits, "–", ORIGINAL)
    for to, kind in FOLDERS:
        if not f"{to} {kind}".startswith(only):
            continue
        try:
            workshop = find_workshop(TARGETS[to], find_device("cpu"))
        except ModelError as missing:
            print(missing, file=sys.stderr)
            continue
        out = (made or folder) / f"{to}-{kind}"
        if not out.exists():
            halfbyte("export", run, "--to", to, "--type", kind, "--out", out)
        loaded = workshop.load(out, shown.texts, shown.ids)
        by = "mlx-lm" if to == "mlx" else "transformers"
        yield row(f"{to} {kind}", by, loaded.logits, _same(loaded.tokens, shown), ADAPTER)


def _in_fp32(run: Path) -> OpenedAdapter:
    """The adapter with products in fp32, whatever the run's own precision on its machine was."""
    found = find_adapter(run)
    if found.recipe is None:
        sys.exit(f"{run} is no run folder.")
    recipe = found.recipe.model_copy(update={"precision": "fp32"})
    return open_adapter(replace(found, recipe=recipe), device="cpu")


def halfbyte(*words: object) -> None:
    """The command as it is typed."""
    print("$ halfbyte", *words, file=sys.stderr)
    command = [sys.executable, "-m", "halfbyte", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"halfbyte {words[0]} ended with {done.returncode}: {done.stderr[-500:]}")


def _shown(opened: OpenedAdapter, held_out: HeldOut) -> Shown:
    ids = [[int(i) for i in piece.input_ids][:LONGEST] for piece in held_out.pieces]
    texts, tokens = [], []
    for piece in held_out.pieces:
        whole = [int(i) for i in piece.input_ids]
        text = opened.tokenizer.decode(whole, skip_special_tokens=False)
        if not piece.cut and opened.tokenizer(text, add_special_tokens=False)["input_ids"] == whole:
            texts.append(text)
            tokens.append(whole)
    return Shown(ids, texts, tokens)


@torch.no_grad()
def _logits(opened: OpenedAdapter, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    import numpy as np

    from halfbyte.data.batch import TokenizedRow

    made = [
        TokenizedRow(np.array(row, dtype=np.int32), np.zeros(len(row), dtype=bool), number)
        for number, row in enumerate(rows)
    ]
    return [opened.qlora.logits(make_batch([row])).float() for row in made]


@torch.no_grad()
def _asked(model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    model = model.eval()
    return [model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows]


def _by_transformers(
    folder: Path, shown: Shown, gguf: str | None = None
) -> tuple[list[Tensor], str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    how = {} if gguf is None else {"gguf_file": gguf}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
    tokenizer = AutoTokenizer.from_pretrained(folder, **how)
    made = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in shown.texts]
    return _asked(model, shown.ids), _same(made, shown)


def _by_llama_cpp(
    python: str, file: Path, shown: Shown, lora: Path | None = None
) -> tuple[list[Tensor], str]:
    found = ask_llama_cpp(python, file, shown.texts, shown.ids, special=False, lora=lora)
    return [torch.from_numpy(logits) for logits in found.logits], _same(found.tokens, shown)


def _same(made: Sequence[Sequence[int]], shown: Shown) -> str:
    different = sum([*one] != other for one, other in zip(made, shown.tokens, strict=True))
    count = len(shown.tokens)
    return f"equal in {count} rows" if not different else f"differ in {different} of {count} rows"


def _by_peft(opened: OpenedAdapter, adapter: Path, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """PEFT on transformers' model, whose linear weights went through bitsandbytes' NF4."""
    import peft
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from transformers import AutoModelForCausalLM

    source = opened.source
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32)
    state = {name: source.read(name, torch.float32) for name in source.names()}
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    recipe = opened.found.recipe
    for name in opened.qlora.linears:
        weight = model.get_submodule(name).weight
        packed, how = quantize_4bit(
            source.read(f"{name}.weight").clone(),
            blocksize=64 if recipe is None else recipe.quantization.block_size,
            compress_statistics=True if recipe is None else recipe.quantization.double_quant,
            quant_type="nf4",
        )
        weight.data.copy_(dequantize_4bit(packed, how))
    return _asked(peft.PeftModel.from_pretrained(model, adapter), rows)


def _base_gguf(opened: OpenedAdapter, out: Path) -> None:
    """The base alone, through a folder of transformers' and ``halfbyte export``."""
    from transformers import AutoModelForCausalLM

    source = opened.source
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "base"
        model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32)
        state = {key: source.read(key, torch.float32) for key in source.names()}
        model.load_state_dict(state, strict=False)
        model.tie_weights()
        model.save_pretrained(folder)
        tokenizer = copy.deepcopy(source.tokenizer)
        tokenizer.save_pretrained(folder)
        halfbyte("export", folder, "--to", "gguf", "--type", "f32", "--out", out)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
