"""One process of a peer: timed steps through its own documented route, then one profiled.

    python -m peers.run_peer SPEC

SPEC is JSON, from ``cases.Measurement.spec`` and more. The peers are TRL + PEFT + bitsandbytes
(``trl``), the same with Liger's layer kernels and batches laid end to end (``trl-liger``) or padded
(``trl-liger-padded``), and Unsloth (``unsloth``). One JSON line is printed on standard output; all
that the peers print goes to standard error.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from peers.kernel_time import KernelProfile

STARTED = time.perf_counter()
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK, ALPHA, LEARNING_RATE, SEED = 16, 32, 2e-4, 42
PACKAGES = (
    *("torch", "triton", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "trl"),
    *("liger-kernel", "unsloth", "unsloth_zoo", "torchao"),
)


def set_environment(work: Path) -> None:
    """What must be set before a peer is imported: nothing is downloaded or sent."""
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "HF_HOME": str(work / "hf"),
        "WANDB_DISABLED": "true",
        "CUDA_VISIBLE_DEVICES": "0",
        "UNSLOTH_COMPILE_LOCATION": str(work / "unsloth_compiled_cache"),
    }.items():
        os.environ.setdefault(name, value)


# ---- the peers -------------------------------------------------------------


def load_trl(spec: dict[str, Any], model_folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The quantized model, its tokenizer, and what the trainer is given beside them."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        model_folder,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        dtype=torch.bfloat16,
        device_map={"": 0},
    )
    lora = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=spec["dropout"],
        bias="none",
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    return model, AutoTokenizer.from_pretrained(model_folder), {"peft_config": lora}


def load_unsloth(spec: dict[str, Any], model_folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """As ``load_trl``, with the adapter attached; its 4-bit weights are always double-quantized."""
    import torch
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(model_folder),
        max_seq_length=spec["max_length"],
        dtype=torch.bfloat16,
        load_in_4bit=True,
        use_gradient_checkpointing=spec["checkpointing"],
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        target_modules=TARGETS,
        lora_alpha=ALPHA,
        lora_dropout=spec["dropout"],
        bias="none",
        use_gradient_checkpointing=spec["checkpointing"],
        random_state=SEED,
        max_seq_length=spec["max_length"],
    )
    return model, tokenizer, {}


def training_arguments(spec: dict[str, Any]) -> Any:
    """The recipe's settings, every one given: Unsloth's defaults differ."""
    from trl import SFTConfig

    more: dict[str, Any] = {}
    if spec["tool"].startswith("trl-liger"):
        more["use_liger_kernel"] = True
    if lies_end_to_end(spec):
        more |= {"padding_free": True, "max_length": None}  # its rows are cut already
    return SFTConfig(
        output_dir=str(Path(spec["work"]) / f"out-{spec['tool']}"),
        per_device_train_batch_size=spec["batch"],
        gradient_accumulation_steps=1,
        max_steps=spec["recipe_steps"],
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="paged_adamw_8bit",
        bf16=True,
        seed=SEED,
        data_seed=SEED,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_drop_last=True,
        dataset_text_field="text",
        packing=False,
        gradient_checkpointing=spec["checkpointing"],
        **({"max_length": spec["max_length"]} | more),
    )


def lies_end_to_end(spec: dict[str, Any]) -> bool:
    return spec["tool"] == "trl-liger"


def make_dataset(spec: dict[str, Any], rows: dict[str, Any]) -> Any:
    """Texts for the peer to tokenize; laid end to end, TRL cuts nothing and is given tokens."""
    from datasets import Dataset

    if lies_end_to_end(spec):
        return Dataset.from_dict({"input_ids": rows["ids"]})
    return Dataset.from_dict({"text": rows["texts"]})


# ---- what is measured ------------------------------------------------------


def count(inputs: dict[str, Any]) -> tuple[Any, Any]:
    """(tokens, labels) of a batch, as numbers or as tensors to be read later.

    Padding is not counted. The first token of a row is predicted from nothing, so it is not
    counted as a label even where a peer masks it only later, in its loss.
    """
    import torch

    ids, labels = inputs["input_ids"], inputs.get("labels")
    learned = torch.ones_like(ids, dtype=torch.bool) if labels is None else labels != -100
    learned = learned.clone()
    learned[:, 0] = False
    tokens: Any = ids.numel()
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == ids.shape:
        tokens = mask.sum()
        if labels is None:
            learned &= mask.bool()
    lengths = inputs.get("packed_seq_lengths")
    if lengths is not None:
        borders = torch.cumsum(lengths.flatten().to(torch.int64), 0)[:-1]
        learned[0, borders.to(learned.device)] = False
    elif inputs.get("position_ids") is not None:
        learned &= inputs["position_ids"] != 0
    return tokens, learned.sum()


def make_clock(spec: dict[str, Any]) -> Any:
    """A callback that times the steps, profiles the one after them and ends the training."""
    import torch
    from transformers import TrainerCallback

    last = spec["warmup"] + spec["steps"]

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.begin: list[float] = []
            self.end: list[float] = []
            self.losses: list[float] = []
            self.counts: list[tuple[Any, Any]] = []
            self.shapes: set[str] = set()
            self.memory: tuple[int, int] = (0, 0)
            self.first_step_s = 0.0
            self.profile: dict[str, Any] = {}
            self._profiler: Any = None

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.first_step_s = time.perf_counter() - STARTED

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            if len(self.begin) == last:
                self.memory = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
                Path(spec["mark"]).touch()
                try:
                    self._profiler = KernelProfile()
                    self._profiler.start()
                except Exception as error:  # the times are good without it
                    self.profile = {"profile_error": str(error)}
            self.begin.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            torch.cuda.synchronize()
            self.end.append(time.perf_counter())
            if len(self.end) <= last:
                return
            if not self.profile:
                try:
                    self.profile = self._profiler.stop(1)
                except Exception as error:
                    self.profile = {"profile_error": str(error)}
            control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))

    return Clock()


def time_preparation(trainer_class: Any) -> list[float]:
    """Seconds of each call of the trainer's own preparation of its rows, as they come."""
    seconds: list[float] = []
    prepare = trainer_class._prepare_dataset

    @functools.wraps(prepare)
    def timed(*args: Any, **keywords: Any) -> Any:
        began = time.perf_counter()
        try:
            return prepare(*args, **keywords)
        finally:
            seconds.append(time.perf_counter() - began)

    trainer_class._prepare_dataset = timed
    return seconds


def run(spec: dict[str, Any]) -> dict[str, Any]:
    work = Path(spec["work"])
    set_environment(work)
    rows = json.loads((work / spec["rows_file"]).read_text(encoding="utf-8"))
    spec["max_length"] = rows["max_length"]
    if spec["tool"] == "unsloth":
        import unsloth  # noqa: F401  it wants to be imported before the others
    import torch
    import trl
    from torch.utils.data import SequentialSampler

    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    began = time.perf_counter()
    load = load_unsloth if spec["tool"] == "unsloth" else load_trl
    model, tokenizer, more = load(spec, work / "model")
    torch.cuda.synchronize()
    load_s = time.perf_counter() - began

    clock = make_clock(spec)
    preparation = time_preparation(trl.SFTTrainer)
    trainer = trl.SFTTrainer(
        model=model,
        args=training_arguments(spec),
        train_dataset=make_dataset(spec, rows),
        processing_class=tokenizer,
        callbacks=[clock],
        **more,
    )
    # The rows lie in the order in which halfbyte trains on them.
    trainer._get_train_sampler = lambda *_, **__: SequentialSampler(trainer.train_dataset)
    step = trainer.training_step

    def training_step(model: Any, inputs: Any, *args: Any, **keywords: Any) -> Any:
        clock.counts.append(count(inputs))
        clock.shapes.add(str(tuple(inputs["input_ids"].shape)))
        return step(model, inputs, *args, **keywords)

    trainer.training_step = training_step
    trainer.train()
    return result(spec, trainer, clock, load_s, sum(preparation))


def result(
    spec: dict[str, Any], trainer: Any, clock: Any, load_s: float, tokenize_s: float
) -> dict[str, Any]:
    import torch

    if trainer.args.gradient_accumulation_steps != 1 or len(clock.counts) != len(clock.end):
        raise RuntimeError(f"{len(clock.counts)} micro-batches in {len(clock.end)} steps")
    first, last = spec["warmup"], spec["warmup"] + spec["steps"]
    ms = [(end - begin) * 1e3 for begin, end in zip(clock.begin, clock.end, strict=True)]
    ends = clock.end[first:last]
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    args = trainer.args
    return {
        "ms": ms[first:last],
        # From one step's end to the next one's: with fetching, collating and logging.
        "ms_wall": (ends[-1] - ends[0]) * 1e3 / (len(ends) - 1) if len(ends) > 1 else None,
        "step_tokens": [int(tokens) for tokens, _ in clock.counts][:last],
        "step_labels": [int(labels) for _, labels in clock.counts][:last],
        "losses": clock.losses[:last],
        "peak_allocated_bytes": clock.memory[0],
        "peak_reserved_bytes": clock.memory[1],
        "setup_s": clock.first_step_s,
        "load_s": load_s,
        "tokenize_s": tokenize_s,
        "gpu": torch.cuda.get_device_name(0),
        "effective": {
            "gradient_checkpointing": bool(args.gradient_checkpointing),
            "padding_free": any(getattr(x, "padding_free", False) for x in (trainer, args)),
            "optimizer": str(getattr(args.optim, "value", args.optim)),
            "attention": getattr(trainer.model.config, "_attn_implementation", None),
            "input_shapes": sorted(clock.shapes)[:6],
            "trainable": sum(p.numel() for p in trained),
            "trainable_dtypes": sorted({str(p.dtype) for p in trained}),
        },
        "versions": versions(),
        **clock.profile,
    }


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    sys.stdout.flush()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    code = 0
    try:
        print(json.dumps(run(json.loads(sys.argv[1]))), file=out, flush=True)
    except BaseException:  # also SystemExit, which some peers raise
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)  # some peers leave threads behind


if __name__ == "__main__":
    main()
