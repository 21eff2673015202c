"""Peak resident memory while an adapter is merged into its base model.

    python benchmarks/merge_memory.py [--layers 16 --hidden 1152 …] [--write]

Makes a Llama-shaped model with random bf16 weights in shards, and an adapter of all its linear
layers, in a temporary folder, and merges them in child processes: halfbyte's writing by itself, all
of ``halfbyte merge`` (which then loads the model in 4 bits and compares), and PEFT's
``merge_and_unload`` with ``save_pretrained``. What is measured is how far the process's resident
memory rises above what it held just before: the kernel's high-water mark, reset before. Writing has
to stay under four fp32 copies of the largest tensor + 100 MB, whatever the size of the model.

Prints a table; ``--write`` writes results/merge_memory.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from load_memory import make_folders
from peak_memory import finish, measure, reset_peak, status

ALLOWANCE = 100_000_000  # bytes
CASES = {
    "the weights alone, onto 4 bits": ("halfbyte", "4bit"),
    "the weights alone, onto the original": ("halfbyte", "original"),
    "with its check, onto 4 bits": ("halfbyte merge", "4bit"),
    "merge_and_unload, onto the original": ("PEFT", "original"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1152)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--write", action="store_true", help="also write results/merge_memory.json")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        tool, adapter, out, onto = args.child
        print(json.dumps(merge(tool, Path(adapter), Path(out), onto)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        base = make_folders(Path(scratch), args.layers, args.hidden, args.vocabulary)["shards"]
        adapter = make_adapter(base, Path(scratch) / "adapter")
        for number, (case, (tool, onto)) in enumerate(CASES.items()):
            out = Path(scratch) / f"merged-{number}"
            rows += measure(case, tool, __file__, [tool, str(adapter), str(out), onto])
    finish("merge_memory", rows, write=args.write)


def make_adapter(base: Path, folder: Path) -> Path:
    """Of rank 16 in every linear layer but the head."""
    import torch

    from halfbyte.model.adapter_files import save_adapter
    from halfbyte.model.skeleton import build_skeleton, quantized_linears
    from halfbyte.model.source import open_model
    from halfbyte.recipe.schema import ModelRecipe

    source = open_model(ModelRecipe(name=str(base)))
    linears = quantized_linears(build_skeleton(source.config, source.name))
    layers = {
        name: (
            torch.randn(16, module.in_features) * module.in_features**-0.5,
            torch.randn(module.out_features, 16) * 0.005,
        )
        for name, module in linears.items()
    }
    save_adapter(
        folder,
        layers,
        base_name=str(base),
        r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=sorted({name.rpartition(".")[2] for name in layers}),
    )
    return folder


def merge(tool: str, adapter: Path, out: Path, onto: str) -> dict[str, tuple[float, str]]:
    """Merge in this process; metric: (value, unit)."""
    if tool == "PEFT":
        return merge_peft(adapter, out)
    return merge_halfbyte(adapter, out, onto, check=tool == "halfbyte merge")


def merge_halfbyte(
    adapter: Path, out: Path, onto: Any, *, check: bool
) -> dict[str, tuple[float, str]]:
    import torch

    from halfbyte.export.merged_folder import MergedFolder
    from halfbyte.export.merged_weights import MergedWeights
    from halfbyte.finished import merging
    from halfbyte.finished.found import find_adapter, open_base

    found = find_adapter(adapter)
    source = open_base(found)
    weights = MergedWeights(
        source, found.saved, onto=onto, quantization=merging.quantization_of(found)
    )
    plan = MergedFolder(weights, torch.bfloat16, 5_000_000_000)
    largest = 4 * max(source.read(name).numel() for name in source.names())
    before, began = reset_peak(), time.perf_counter()
    if check:
        merging.merge_adapter(found, out, onto=onto, device="cpu")
    else:
        out.mkdir()
        plan.write_weights(out)
    seconds, peak = time.perf_counter() - began, status("VmHWM")
    found_here: dict[str, tuple[float, str]] = {
        "merged weights": (plan.nbytes, "bytes"),
        "largest tensor in fp32": (largest, "bytes"),
        "peak above start": (peak - before, "bytes"),
        "time": (seconds, "s"),
    }
    if not check:
        found_here["share of bound"] = ((peak - before) / (4 * largest + ALLOWANCE), "")
    return found_here


def merge_peft(adapter: Path, out: Path) -> dict[str, tuple[float, str]]:
    import peft
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401

    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    before, began = reset_peak(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    seconds, peak = time.perf_counter() - began, status("VmHWM")
    return {"peak above start": (peak - before, "bytes"), "time": (seconds, "s")}


if __name__ == "__main__":
    main()
