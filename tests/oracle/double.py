"""The same model as a plain one in fp64: PEFT's adapter on dequantized weights, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from halfbyte.data.batch import TokenizedRow
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.experts import NF4Experts
from oracle.case import Case, Trace, adapter_parameters
from oracle.ours import load, tokenized


def double_model(
    folder: Path, case: Case, model: QLoRAModel, targets: str | list[str] = "all-linear"
) -> Any:
    """A PEFT model in fp64 with the weights that ``model`` computes with."""
    network = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    )
    for name, layer in model.linears.items():
        network.get_submodule(name).weight.data = layer.weight_dense().double()
    for name, module in model.network.named_modules():
        if isinstance(module, NF4Experts):
            for leaf, matrices in module.matrices.items():
                whole = network.get_submodule(name).get_parameter(leaf).data
                for expert in range(len(matrices)):
                    whole[expert] = module.weight(leaf, expert).double()
    peft = get_peft_model(
        network,
        LoraConfig(r=case.r, lora_alpha=case.lora_alpha, target_modules=targets),
        autocast_adapter_dtype=False,
    )
    for name, parameter in adapter_parameters(peft).items():
        parameter.data = model.lora_parameters()[name].detach().double()
    return peft


def mean_loss(peft: Any, rows: Sequence[TokenizedRow]) -> Tensor:
    """The mean over all labelled tokens of ``rows``, each row in a forward pass of its own."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.from_numpy(row.input_ids).long()
        labels = ids.masked_fill(~torch.from_numpy(row.loss_mask), -100)[1:]
        logits = peft(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        count += int((labels != -100).sum())
    return total / count


def train_double(folder: Path, case: Case, adapter: dict[str, Tensor]) -> Trace:
    """Train ``case`` in fp64, with PyTorch's AdamW, clipping and transformers' schedule.

    Needs no GPU and is no nearer to one stack's rounding than to another's.
    """
    peft = double_model(folder, case, load(folder, case))
    parameters = adapter_parameters(peft)
    assert parameters.keys() == adapter.keys()
    for name, parameter in parameters.items():
        parameter.data = adapter[name].double()
    optimizer = torch.optim.AdamW(parameters.values(), lr=case.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, case.steps)
    rows = tokenized(folder, case.loss_on)
    first: dict[str, Tensor] = {}
    losses = []
    for number in range(case.steps):
        at = number * case.rows_per_step
        loss = mean_loss(peft, [rows[i % len(rows)] for i in range(at, at + case.rows_per_step)])
        loss.backward()
        if number == 0:
            first = {n: p.grad.clone() for n, p in parameters.items()}
        torch.nn.utils.clip_grad_norm_(parameters.values(), case.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Trace(first, losses, [], [])
