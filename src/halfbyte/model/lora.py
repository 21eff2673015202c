"""Attaching an adapter to a quantized model."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from halfbyte.model.lora_init import Pair
from halfbyte.model.lora_targets import Targets, adapter_ranks, adapter_scales, choose_targets
from halfbyte.quant.linear import DropoutPosition, QLoRALinear


def attach_lora(
    model: nn.Module,
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    target_modules: Targets,
    seed: int,
    exclude_modules: Targets = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    init: str = "kaiming",
    start: Mapping[str, Pair] | None = None,
) -> dict[str, QLoRALinear]:
    """Give the targeted layers an adapter; returns them by their full name, in the model's order.

    Which layers, ranks and factors these are is said by :mod:`halfbyte.model.lora_targets`. A is
    drawn in order from ``seed`` on the CPU, so that every device gets the same, as PEFT draws it:
    for ``kaiming`` uniform on ±1/√in (a = √5), for ``gaussian`` normal with deviation 1/r. B
    starts at zero. Both are fp32. The other ways to start are those of
    :mod:`halfbyte.model.lora_init`, which has made A and B already: ``start``, by the layer. With
    ``use_dora`` the magnitudes start as the norms of the adapted weights' rows.

    Raises ModelError for a target or a pattern that fits no layer.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QLoRALinear)}
    chosen = choose_targets(layers, target_modules, exclude_modules)
    ranks = adapter_ranks(chosen, r, rank_pattern)
    scales = adapter_scales(ranks, lora_alpha, alpha_pattern, use_rslora)
    generator = torch.Generator().manual_seed(seed)
    position = DropoutPosition(seed)
    for number, name in enumerate(chosen):
        layer = layers[name]
        device = layer.base.device
        if start is not None:
            a, b = start[name]
        else:
            a = _first_a(init, ranks[name], layer.in_features, generator)
            b = torch.zeros(layer.out_features, ranks[name])
        layer.lora_A = nn.Parameter(a.to(device, copy=True))
        layer.lora_B = nn.Parameter(b.to(device, copy=True))
        if start is not None and init.startswith("pissa"):
            layer.initial = a.to(device), b.to(device)
        layer.scale = scales[name]
        layer.dropout_p = lora_dropout
        layer.number = number
        layer.position = position
        if use_dora:
            layer.use_dora()
    return {name: layers[name] for name in chosen}


def attach_saved(
    model: nn.Module, layers: Mapping[str, Pair], scales: Mapping[str, float], *, use_dora: bool
) -> dict[str, QLoRALinear]:
    """Give the layers named in ``layers`` an adapter of these shapes, to be asked, not trained.

    A [r, in] and B [out, r] are copied as fp32, ``scales`` are the factors of B·A by the layer's
    name; DoRA's magnitudes are the caller's to put in. Returns the layers as ``attach_lora`` does.
    The layers of ``layers`` must be there, with these shapes.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, QLoRALinear) and n in layers}
    position = DropoutPosition(0)
    for number, (name, layer) in enumerate(found.items()):
        a, b = (t.to(layer.base.device, torch.float32, copy=True) for t in layers[name])
        layer.lora_A, layer.lora_B = nn.Parameter(a), nn.Parameter(b)
        layer.scale, layer.dropout_p = scales[name], 0.0
        layer.number, layer.position = number, position
        if use_dora:
            layer.use_dora()
    return found


def _first_a(init: str, r: int, columns: int, generator: torch.Generator) -> Tensor:
    """A [r, columns] before the first step."""
    a = torch.empty(r, columns)
    if init == "gaussian":
        return a.normal_(std=1.0 / r, generator=generator)
    bound = 1.0 / math.sqrt(columns)
    return a.uniform_(-bound, bound, generator=generator)
