"""Many rows ready to train: memory and time, cold and from the cache.

    python benchmarks/data_scale.py --data chatdoctor.json [--rows 1000000] [--write]
        [--tokenizer tokenizer.model]

Makes a JSONL file of so many ChatDoctor rows (each with a number in its question and in its answer,
so that no two are alike) and prepares it twice, each time in a process of its own: read, rendered,
tokenized, split and audited as a run does it, up to the first batch. The first time the cache is
empty, the second time the tokens are in it. What is measured is the time from opening the file,
and the most anonymous memory (RssAnon, every 20 ms) that the process and its children held, with
what they held before: Python, the libraries, the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from data_vs_trl import save_tokenizer
from record import write_results

MAX_LENGTH, BATCH = 1024, 4
EVERY = 0.02  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="JSON rows: ChatDoctor's")
    parser.add_argument("--tokenizer", type=Path, help="Llama's tokenizer.model")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--child", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child)))
        return
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        write_rows(args.data, folder / "rows.jsonl", args.rows)
        save_tokenizer(args.tokenizer, folder / "tokenizer")
        for case in ("cold", "from the cache"):
            found = child(folder, args)
            found["rows_per_s"] = args.rows / found["seconds"]
            print(
                f"{args.rows:,} rows {case}: {found['seconds']:,.1f} s, "
                f"{found['rows_per_s']:,.0f} rows/s, {found['peak_anonymous'] / 2**20:,.0f} MiB "
                f"({found['before'] / 2**20:,.0f} MiB before)"
            )
            for metric, unit in UNITS.items():
                row = {"case": f"{args.rows} rows {case}", "tool": "halfbyte"}
                results.append({**row, "metric": metric, "value": found[metric], "unit": unit})
    if args.write:
        write_results("data_scale", results)


UNITS = {"rows_per_s": "rows/s", "seconds": "s", "peak_anonymous": "bytes", "before": "bytes"}


def write_rows(data: Path, path: Path, count: int) -> None:
    source = json.loads(data.read_text(encoding="utf-8"))
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = source[number % len(source)]
            changed = {"input": f"{row['input']} ({number})", "output": f"{row['output']} {number}"}
            file.write(json.dumps({**row, **changed}) + "\n")


def child(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """One process; its last line is the result."""
    command = [sys.executable, __file__, "--data", str(args.data), "--child", str(folder)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "caches"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(folder: Path) -> dict[str, float]:
    from transformers import AutoTokenizer

    from halfbyte.data.batching import Batches
    from halfbyte.data.prepare import prepare
    from halfbyte.recipe import Recipe

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    data = {"path": str(folder / "rows.jsonl"), "max_length": MAX_LENGTH, "template": "alpaca"}
    recipe = Recipe.model_validate({"model": {"name": "tiny"}, "data": data})
    before = peak = anonymous()
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(EVERY):
            peak = max(peak, anonymous())

    watching = threading.Thread(target=watch)
    watching.start()
    began = time.perf_counter()
    prepared = prepare(recipe, tokenizer, MAX_LENGTH)
    [batch] = Batches(prepared.train, BATCH, 1, 0).step(1)
    seconds = time.perf_counter() - began
    ended.set()
    watching.join()
    assert batch.num_labels
    return {"seconds": seconds, "peak_anonymous": peak, "before": before}


def anonymous() -> int:
    """Bytes of anonymous memory that this process and its children hold."""
    total = 0
    for process in ("self", *children()):
        try:
            lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
        except OSError:  # it ended
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return total


def children() -> list[str]:
    found: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found += (task / "children").read_text(encoding="utf-8").split()
        except OSError:  # the thread ended, or the kernel does not tell
            continue
    return found


if __name__ == "__main__":
    main()
