"""The usual stack: TRL's SFTTrainer on PEFT's adapter on bitsandbytes' 4-bit layers, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from oracle.case import Case, Trace, adapter_parameters, make_rows


class _Recorder(SFTTrainer):
    """Keeps each step's loss and the first step's gradients, and changes nothing."""

    first: dict[str, Tensor]
    step_losses: dict[int, float]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        step = self.state.global_step
        # Each micro-batch's part is divided by the labels of the whole step already.
        self.step_losses[step] = self.step_losses.get(step, 0.0) + loss.item()
        if step == 0:  # the last micro-batch leaves the sum; clipping comes after it
            self.first = {n: p.grad.clone() for n, p in adapter_parameters(self.model).items()}
        return loss


def train_reference(folder: Path, case: Case, adapter: dict[str, Tensor], workplace: Path) -> Trace:
    """Train ``case`` from the model in ``folder`` and ``adapter``."""
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=case.double_quant,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    rows = make_rows()
    if case.loss_on == "answer":
        data = [{"prompt": prompt, "completion": answer} for prompt, answer in rows]
    else:
        data = [{"text": prompt + answer} for prompt, answer in rows]
    trainer = _Recorder(
        model,
        args=SFTConfig(
            output_dir=str(workplace),
            use_cpu=True,
            bf16=False,
            max_steps=case.steps,
            per_device_train_batch_size=case.batch_size,
            gradient_accumulation_steps=case.gradient_accumulation,
            train_sampling_strategy="sequential",
            optim={"adamw": "adamw_torch", "adamw_8bit": "paged_adamw_8bit"}[case.optimizer],
            learning_rate=case.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=case.max_grad_norm,
            gradient_checkpointing=False,
            max_length=256,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(
            r=case.r,
            lora_alpha=case.lora_alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    matrices = adapter_parameters(trainer.model)
    assert matrices.keys() == adapter.keys()
    for name, parameter in matrices.items():
        # TRL has made them bf16; fp32 is what is compared.
        parameter.data = adapter[name].clone()
    trainer.step_losses = {}
    trainer.train()
    return Trace(
        gradients=trainer.first,
        losses=[trainer.step_losses[step] for step in range(case.steps)],
        tokens=list(trainer.train_dataset["input_ids"]),
        labels=list(trainer.train_dataset["labels"]),
    )
