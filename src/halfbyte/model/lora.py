"""Attaching an adapter to a quantized model."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from halfbyte.errors import ModelError
from halfbyte.quant.linear import DropoutPosition, QLoRALinear


def attach_lora(
    model: nn.Module,
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    target_modules: str | list[str],
    seed: int,
) -> dict[str, QLoRALinear]:
    """Give the targeted layers an adapter; returns them by their full name, in the model's order.

    A starts as PEFT starts it, uniform on ±1/√in (Kaiming, a = √5), drawn in order from ``seed``
    on the CPU so that every device gets the same; B starts at zero. Both are fp32. A target is
    the last part of a layer's name (``q_proj``), or the whole name, or a tail of it at a dot.

    Raises ModelError, with the names there are, for a target that fits no layer.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QLoRALinear)}
    chosen = choose_targets(layers, target_modules)
    generator = torch.Generator().manual_seed(seed)
    position = DropoutPosition(seed)
    for number, name in enumerate(chosen):
        layer = layers[name]
        bound = 1.0 / math.sqrt(layer.in_features)
        start = torch.empty(r, layer.in_features).uniform_(-bound, bound, generator=generator)
        device = layer.base.device
        layer.lora_A = nn.Parameter(start.to(device))
        layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, r, device=device))
        layer.scale = lora_alpha / r
        layer.dropout_p = lora_dropout
        layer.number = number
        layer.position = position
    return {name: layers[name] for name in chosen}


def choose_targets(names: Iterable[str], target_modules: str | list[str]) -> list[str]:
    """Those of ``names`` (linear layers, the head not among them) that ``target_modules`` means."""
    names = list(names)
    if target_modules == "all-linear":
        return names
    targets = [target_modules] if isinstance(target_modules, str) else target_modules
    for target in targets:
        if not any(_fits(name, target) for name in names):
            there = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
            raise ModelError(
                f"lora.target_modules names {target!r}, which this model does not have; "
                f"it has {there}."
            )
    return [name for name in names if any(_fits(name, target) for target in targets)]


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
