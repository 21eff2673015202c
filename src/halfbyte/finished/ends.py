"""Embedding and head of an adapter from elsewhere, brought to what a model in memory has a place
for: rows of new tokens, or the whole of either."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import ModelError
from halfbyte.model.adapter_files import SavedAdapter
from halfbyte.model.trained_rows import EMBEDDING, HEAD

_MERGE = "merge it with PEFT's merge_and_unload"


@dataclass(frozen=True)
class _Ends:
    """Embedding and head of a transformers model, and their full names."""

    embedding: Any
    head: Any
    embedding_name: str
    head_name: str

    @classmethod
    def of(cls, network: Any) -> _Ends:
        embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
        names = {id(module): name for name, module in network.named_modules()}
        return cls(embedding, head, names[id(embedding)], names[id(head)])

    @property
    def tied(self) -> bool:
        return self.head.weight is self.embedding.weight

    def weight(self, name: str) -> Tensor:
        return self.head.weight if name == self.head_name else self.embedding.weight


@torch.no_grad()
def settle_ends(network: Any, saved: SavedAdapter, scales: Mapping[str, float]) -> SavedAdapter:
    """``saved`` with nothing of embedding and head but rows that follow one another, or all.

    Low-rank matrices of the head, and rows of single tokens, become the whole weight [vocabulary,
    H] that they make of the base's in ``network``. Where the base has one weight for both ends and
    the adapter another for each, as PEFT does unless ``ensure_weight_tying`` is set, the head of
    ``network`` gets a weight of its own. Raises ModelError where other modules are trained whole,
    and where DoRA is on the head.
    """
    ends = _Ends.of(network)
    strange = {_leaf(name) for name in saved.modules} - {EMBEDDING, HEAD}
    strange |= {_leaf(name) for name in saved.token_rows} - {EMBEDDING, HEAD}
    if strange:
        raise ModelError(
            f"the adapter has trained {', '.join(sorted(strange))} whole, which halfbyte does not "
            f"read; {_MERGE}."
        )
    modules = dict(saved.modules)
    rows = _scattered(ends, saved, modules)
    layers = dict(saved.layers)
    pair = layers.pop(ends.head_name, None)
    if pair is not None:
        modules[ends.head_name] = _adapted_head(ends, saved, pair, scales[ends.head_name])
    if ends.tied and _are_apart(ends, saved, modules):
        ends.head.weight = nn.Parameter(ends.embedding.weight.clone(), requires_grad=False)
    return replace(saved, layers=layers, modules=modules, token_rows=rows)


def _scattered(ends: _Ends, saved: SavedAdapter, modules: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of tokens that stay such; others are put into whole weights in ``modules``."""
    ids = saved.token_ids()
    runs = {tuple(one) for one in ids.values()}
    is_run = all(one == tuple(range(one[0], one[0] + len(one))) for one in runs)
    if is_run and len(runs) <= 1 and not ids.keys() & modules.keys():
        return dict(saved.token_rows)
    for name, rows in saved.token_rows.items():
        whole = modules.get(name, ends.weight(name)).to("cpu", torch.float32, copy=True)
        whole[ids[name]] = rows.float()
        modules[name] = whole
        if ends.tied and name == ends.embedding_name and ends.head_name not in saved.token_rows:
            modules[ends.head_name] = whole  # PEFT keeps such rows of both ends the same
    return {}


def _adapted_head(
    ends: _Ends, saved: SavedAdapter, pair: tuple[Tensor, Tensor], scale: float
) -> Tensor:
    if ends.head_name in saved.magnitudes:
        raise ModelError(
            f"the adapter has DoRA on the output head {ends.head_name}, which halfbyte does not "
            f"read; {_MERGE}."
        )
    weight = saved.modules.get(ends.head_name, ends.head.weight).to("cpu", torch.float32)
    a, b = (matrix.to("cpu", torch.float32) for matrix in pair)
    return torch.addmm(weight, b, a, alpha=scale)


def _are_apart(ends: _Ends, saved: SavedAdapter, modules: Mapping[str, Tensor]) -> bool:
    """Whether embedding and head, one weight in the base, are two with the adapter."""
    embedding, head = modules.get(ends.embedding_name), modules.get(ends.head_name)
    if embedding is None and head is None:
        return False
    if ends.head_name not in saved.layers and saved.config.get("ensure_weight_tying"):
        return False
    return embedding is None or head is None or not torch.equal(embedding, head)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
