"""The TinyLlama recipe on this machine's GPU, with random weights of the right shape.

    python benchmarks/gpu_recipe.py --data chatdoctor.json --tokenizer tokenizer.model [--write]

Runs recipes/tinyllama-chatdoctor.yaml as it stands for so many steps, then again, and with
variations: the weights dequantized once and nothing recomputed, and fp16 with loss scaling. Prints
milliseconds a step, peak memory, and whether the two equal runs gave equal losses.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from record import ROOT, write_results

sys.path.insert(0, str(ROOT / "tests"))

VARIATIONS = {
    "recipe": [],
    "recipe again": [],
    "nothing recomputed": ["training.gradient_checkpointing=false"],
    "fp16": ["precision=fp16"],
    "double quantization": ["quantization.double_quant=true"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="JSON rows: ChatDoctor's")
    parser.add_argument("--tokenizer", type=Path, required=True, help="Llama's tokenizer.model")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", args.tokenizer)
        found = {case: run(case, folder, args) for case in VARIATIONS}
    rows = []
    print(f"{'case':22}{'ms/step':>9}{'tokens/s':>10}{'peak GiB':>10}  losses 1, 10, last")
    for case, r in found.items():
        shown = ", ".join(f"{r['losses'][i]:.4f}" for i in (0, 9, -1))
        ms, rate, peak = r["ms"], r["tokens_per_s"], r["peak_gib"]
        print(f"{case:22}{ms:9.1f}{rate:10,.0f}{peak:10.2f}  {shown}")
        for metric, value, unit in (
            ("ms_per_step", ms, "ms"),
            ("tokens_per_s", rate, "tokens/s"),
            ("peak_gib", peak, "GiB"),
        ):
            rows.append(
                {"case": case, "tool": "halfbyte", "metric": metric, "value": value, "unit": unit}
            )
    first, again = found["recipe"]["losses"], found["recipe again"]["losses"]
    apart = max(abs(a - b) for a, b in zip(first, again, strict=True))
    print(f"two equal runs: losses differ by at most {apart:g}")
    rows.append(
        {
            "case": "recipe twice",
            "tool": "halfbyte",
            "metric": "largest difference of losses",
            "value": apart,
            "unit": "nats",
        }
    )
    if args.write:
        write_results("gpu_recipe", rows, device=torch.cuda.get_device_name())


def make_model(folder: Path, tokenizer_model: Path) -> None:
    """A random model of TinyLlama-1.1B's shape with Llama's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama_tokenizer import llama_tokenizer

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    llama_tokenizer(tokenizer_model).save_pretrained(folder)


def run(case: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    from halfbyte import Recipe, train
    from halfbyte.events import read_events
    from halfbyte.events.types import Step

    changes = [
        f"model.name={folder / 'model'}",
        f"data.path={args.data}",
        "evaluation.prompts=1",
        *VARIATIONS[case],
    ]
    recipe = Recipe.load(ROOT / "recipes" / "tinyllama-chatdoctor.yaml", changes)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    out = folder / case.replace(" ", "-")
    train(recipe, out=out, runs=folder, max_steps=args.steps)
    steps = [r.event for r in read_events(out) if isinstance(r.event, Step)]
    timed = steps[5:]
    return {
        "ms": median(s.seconds for s in timed) * 1e3,
        "tokens_per_s": sum(s.tokens for s in timed) / sum(s.seconds for s in timed),
        "peak_gib": max(s.memory_bytes for s in steps) / 2**30,
        "losses": [s.loss for s in steps],
    }


if __name__ == "__main__":
    main()
