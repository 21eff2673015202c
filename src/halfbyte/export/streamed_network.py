"""A model's logits with the weights of one layer in memory at a time.

The network is transformers' own, so that what it says of a folder is what others will get who load
it. Embedding, head, linear layers and experts get their weights just before they run and lose them
after.
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
    streamed = {**quantized_linears(network), **find_experts(network), **_ends(network)}
    where = _places(network, set(source.names()))
    _fill(network, source, set(streamed), device, dtype)
    make_buffers(network, device)
    for name, module in streamed.items():
        _stream(module, name, where, source, device, dtype)
    groups = [[row] for row in rows] if _by_length(source.config) else [list(rows)]
    found: list[Tensor] = []
    for group in groups:
        ids = nn.utils.rnn.pad_sequence(group, batch_first=True).to(device)
        logits = network(input_ids=ids, use_cache=False).logits
        found += [logits[at, : len(row)].float().cpu() for at, row in enumerate(group)]
    return found


def _ends(network: Any) -> dict[str, nn.Module]:
    """Embedding and head by full name."""
    ends = network.get_input_embeddings(), network.get_output_embeddings()
    return {name: module for name, module in network.named_modules() if module in ends}


def _places(network: Any, there: set[str]) -> dict[str, str]:
    """Parameter: which of the names of what is one object with it the checkpoint has."""
    by_object: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        by_object.setdefault(id(parameter), []).append(name)
    found: dict[str, str] = {}
    for names in by_object.values():
        held = [name for name in names if name in there]
        found |= {name: name if name in there else held[0] for name in names if held}
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
    module: nn.Module,
    name: str,
    where: dict[str, str],
    source: ModelSource,
    device: str,
    dtype: torch.dtype,
) -> None:
    """Give ``module`` its matrices when it is about to run, and take them away after."""
    empty = {
        leaf: parameter
        for leaf, parameter in module.named_parameters(recurse=False)
        if leaf != "bias"
    }

    def before(module: nn.Module, _: Any) -> None:
        for leaf in empty:
            value = source.read(where[f"{name}.{leaf}"], dtype).to(device)
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
