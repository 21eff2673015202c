"""A model's logits with the weights of one layer in memory at a time.

The network is transformers' own, so that what it says of a folder is what others will get who load
it. Linear layers and experts get their weights just before they run and lose them after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.model.experts import find_experts
from halfbyte.model.skeleton import build_skeleton, make_buffers, quantized_linears
from halfbyte.model.source import ModelSource

# Rotary frequencies that depend on how long the longest row of a batch is.
_BY_LENGTH = ("dynamic", "longrope")


@torch.no_grad()
def streamed_logits(
    source: ModelSource, rows: Sequence[Tensor], *, device: str, dtype: torch.dtype
) -> list[Tensor]:
    """Logits [T, vocabulary], fp32 on the CPU, of each of ``rows``, token ids int64 [T].

    The products are made in ``dtype``. The rows go through the layers together, padded at their
    ends, which no token before sees. Raises ModelError for weights that are damaged.
    """
    network = build_skeleton(source.config, source.name)
    streamed = {**quantized_linears(network), **find_experts(network)}
    _fill(network, source, set(streamed), device, dtype)
    make_buffers(network, device)
    for name, module in streamed.items():
        _stream(module, name, source, device, dtype)
    groups = [[row] for row in rows] if _by_length(source.config) else [list(rows)]
    found: list[Tensor] = []
    for group in groups:
        ids = nn.utils.rnn.pad_sequence(group, batch_first=True).to(device)
        logits = network(input_ids=ids, use_cache=False).logits
        found += [logits[at, : len(row)].float().cpu() for at, row in enumerate(group)]
    return found


def _fill(
    network: Any, source: ModelSource, streamed: set[str], device: str, dtype: torch.dtype
) -> None:
    """Read what is not streamed; parameters that are one object stay one."""
    there = set(source.names())
    filled: dict[int, nn.Parameter] = {}
    for name, parameter in list(network.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        if name in there and id(parameter) not in filled and not _waits(owner, leaf, streamed):
            value = source.read(name, dtype).to(device)
            filled[id(parameter)] = nn.Parameter(value, requires_grad=False)
    for module in network.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in filled:
                setattr(module, leaf, filled[id(parameter)])
    for name, buffer in list(network.named_buffers()):
        if name in there and buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            value = source.read(name).to(buffer.dtype).to(device)
            setattr(network.get_submodule(owner), leaf, value)


def _waits(owner: str, leaf: str, streamed: set[str]) -> bool:
    return owner in streamed and leaf != "bias"


def _stream(
    module: nn.Module, name: str, source: ModelSource, device: str, dtype: torch.dtype
) -> None:
    """Give ``module`` its matrices when it is about to run, and take them away after."""
    empty = {
        leaf: parameter
        for leaf, parameter in module.named_parameters(recurse=False)
        if leaf != "bias"
    }

    def before(module: nn.Module, _: Any) -> None:
        for leaf in empty:
            value = source.read(f"{name}.{leaf}", dtype).to(device)
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))

    def after(module: nn.Module, *_: Any) -> None:
        for leaf, parameter in empty.items():
            setattr(module, leaf, parameter)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _by_length(config: Any) -> bool:
    settings = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [settings.get("rope_type"), *(_kind(value) for value in settings.values())]
    return any(kind in _BY_LENGTH for kind in kinds)


def _kind(value: object) -> object:
    return value.get("rope_type") if isinstance(value, dict) else None
