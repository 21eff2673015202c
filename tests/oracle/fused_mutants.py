"""Ways to fuse another network, each a change of one of the functions that fusing is made of.

A mutant makes its change through ``monkeypatch`` or in the kernels that it returns; it takes effect
for layers that are fused afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from halfbyte.data.batch import Batch
from halfbyte.kernels.choice import Kernels
from halfbyte.kernels.lora_group import LoraGroup
from halfbyte.model import fused
from halfbyte.model.fused import FusedNetwork
from halfbyte.model.fused_layer import Rows
from halfbyte.quant.joined import FlatAdapter, JoinedLinear, Scratch
from halfbyte.quant.linear import QLoRALinear

FusedMutant = Callable[[pytest.MonkeyPatch, Kernels], Kernels]


def residual_gradient_dropped(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Kernels:
    """The gradient goes through each layer's branches, and not past them."""
    right = kernels.rms_norm_backward

    def wrong(*args: Any, first: bool = False) -> None:
        right(*args, first=True)

    return replace(kernels, rms_norm_backward=wrong)


def scale_halved(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Kernels:
    _change_groups(monkeypatch, lambda group: replace(group, scale=group.scale / 2))
    return kernels


def mask_of_another_module(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Kernels:
    """k drops what q drops: consistent with itself, but not PEFT's independent masks."""

    def shared(group: LoraGroup) -> LoraGroup:
        parts = tuple(replace(part, module=group.parts[0].module) for part in group.parts)
        table = group.table.clone()
        table[:, 4] = table[0, 4]
        return replace(group, parts=parts, table=table)

    _change_groups(monkeypatch, shared)
    return kernels


def other_mask_in_the_gradient(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Kernels:
    """The gradient of the input is not masked as the input was."""
    right = kernels.lora_grad_input
    return replace(
        kernels, lora_grad_input=lambda d_x, group, keys: right(d_x, group, keys.roll(1, 0))
    )


def kept_elements_not_scaled(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Kernels:
    right = kernels.lora_down

    def wrong(x: torch.Tensor, group: LoraGroup, keys: torch.Tensor | None) -> None:
        right(x, group, keys)
        x[:, group.columns :] *= 1.0 - group.p

    return replace(kernels, lora_down=wrong)


def kept_weight_has_the_old_b(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Kernels:
    """B is folded in once, and not again after an update."""
    attach, fold = FusedNetwork.attach, FusedNetwork.fold

    def attached(self: FusedNetwork, adapter: FlatAdapter) -> None:
        attach(self, adapter)
        fold(self)

    monkeypatch.setattr(FusedNetwork, "attach", attached)
    monkeypatch.setattr(FusedNetwork, "fold", lambda self: None)
    return kernels


def scratch_weight_has_the_old_b(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Kernels:
    """What the last pass left in scratch memory is taken for this pass's."""

    def rows(self: FusedNetwork, batch: Batch, keys: torch.Tensor | None) -> Rows:
        self.prepare(batch.max_seqlen)
        return Rows(
            batch.position_ids, batch.cu_seqlens, batch.max_seqlen, self.cos, self.sin, keys
        )

    monkeypatch.setattr(FusedNetwork, "_rows", rows)
    return kernels


def scratch_of_another_layer(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Kernels:
    """A layer finds another one's weight in the scratch memory, and takes it for its own."""
    right = JoinedLinear.weight

    def wrong(self: JoinedLinear) -> torch.Tensor:
        scratch: Scratch | None = self.scratch
        if scratch is not None and scratch.owner is not None:
            scratch.owner = self
        return right(self)

    monkeypatch.setattr(JoinedLinear, "weight", wrong)
    return kernels


def old_a(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Kernels:
    """A is rounded to the products' type once, and not again after an update."""
    monkeypatch.setattr(FusedNetwork, "adapter_changed", lambda self: self.fold())
    return kernels


def adapters_hand_no_gradient_down(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Kernels:
    return replace(kernels, lora_grad_input=lambda *_: None)


def k_and_v_exchanged(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Kernels:
    class Wrong(JoinedLinear):
        def __init__(self, layers: Sequence[QLoRALinear], kernels: Kernels) -> None:
            if len(layers) == 3:
                layers = [layers[0], layers[2], layers[1]]
            super().__init__(layers, kernels)

    monkeypatch.setattr(fused, "JoinedLinear", Wrong)
    return kernels


def gradient_not_rotated_back(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Kernels:
    right = kernels.rope

    def wrong(*args: Any, inverse: bool) -> None:
        if not inverse:
            right(*args, inverse=False)

    return replace(kernels, rope=wrong)


def bias_forgotten(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Kernels:
    monkeypatch.setattr("halfbyte.quant.joined._joined_bias", lambda layers: None)
    return kernels


def window_forgotten(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Kernels:
    monkeypatch.setattr(fused, "_window", lambda *_: None)
    return kernels


def _change_groups(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[LoraGroup], LoraGroup]
) -> None:
    attach = JoinedLinear.attach

    def attached(self: JoinedLinear, adapter: FlatAdapter) -> None:
        attach(self, adapter)
        if self.group is not None:
            self.group = change(self.group)

    monkeypatch.setattr(JoinedLinear, "attach", attached)


FUSED_MUTANTS: dict[str, FusedMutant] = {
    m.__name__: m
    for m in (
        residual_gradient_dropped,
        scale_halved,
        mask_of_another_module,
        other_mask_in_the_gradient,
        kept_elements_not_scaled,
        kept_weight_has_the_old_b,
        scratch_weight_has_the_old_b,
        scratch_of_another_layer,
        old_a,
        adapters_hand_no_gradient_down,
        k_and_v_exchanged,
        gradient_not_rotated_back,
        bias_forgotten,
        window_forgotten,
    )
}
