"""``python -m halfbyte.run.bench_trl SPEC.json``: the steps of ``halfbyte bench`` through TRL.

TRL + PEFT + bitsandbytes as their documentation has it, over the rows that halfbyte trained on, in
the same order. Prints one JSON line, last. SPEC.json is written by ``halfbyte.run.bench``.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler

from halfbyte.run.bench import figures
from halfbyte.run.precision import DTYPES


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """The entry of ``trl`` in the object of ``halfbyte.run.bench.measure``."""
    # By name, since none of them is a dependency.
    datasets, peft, transformers, trl = (
        import_module(name) for name in ("datasets", "peft", "transformers", "trl")
    )
    callback: Any = transformers.TrainerCallback
    began = time.perf_counter()
    on_gpu = spec["device"] == "cuda"
    dtype = DTYPES[spec["precision"]]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        spec["model"],
        trust_remote_code=False,
        use_safetensors=True,
        dtype=dtype,
        device_map={"": spec["device"]},
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    begins: list[float] = []
    ends: list[float] = []
    losses: list[float] = []

    def wait() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(callback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            begins.append(wait())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(wait())

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    trainer = trl.SFTTrainer(
        model=model,
        processing_class=transformers.AutoTokenizer.from_pretrained(
            spec["model"], trust_remote_code=False
        ),
        train_dataset=datasets.Dataset.from_dict({"input_ids": spec["rows"]}),
        args=trl.SFTConfig(
            output_dir=spec["out"],
            per_device_train_batch_size=spec["batch_size"],
            gradient_accumulation_steps=1,
            gradient_checkpointing=False,
            max_steps=spec["warmup"] + spec["steps"],
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            warmup_steps=0,
            max_grad_norm=1.0,
            optim="paged_adamw_8bit" if on_gpu else "adamw_8bit",
            bf16=spec["precision"] == "bf16",
            fp16=spec["precision"] == "fp16",
            use_cpu=not on_gpu,
            max_length=512,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=on_gpu,
        ),
        peft_config=peft.LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.05,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            task_type="CAUSAL_LM",
        ),
        callbacks=[Clock()],
    )
    trainer._get_train_sampler = lambda *_, **__: SequentialSampler(trainer.train_dataset)
    trainer.train()
    first = spec["warmup"] * spec["batch_size"]
    return figures(
        seconds=[end - begin for begin, end in zip(begins, ends, strict=True)][spec["warmup"] :],
        tokens=sum(map(len, spec["rows"][first:])),
        losses=losses,
        ready_s=begins[0] - began,
    )


if __name__ == "__main__":
    print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
