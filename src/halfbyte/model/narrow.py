"""Embedding and head kept in the 16 bits that they are stored in, the rest of a model being fp32.

fp32 copies of 16-bit values are the same values in twice the memory: 0.26 GB of a model of 1.1
billion parameters. The embedding's rows are widened when they are looked up. The head's product is
made in 16 bits anyway, as autocast makes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.kernels.gather_rows import fetch_rows, pinned


class NarrowEmbedding(nn.Embedding):
    """Looks rows up and gives them in ``out_dtype``."""

    out_dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(self.out_dtype)


class HostEmbedding(NarrowEmbedding):
    """Keeps its rows in main memory, where a GPU fetches those that it needs."""

    def forward(self, input: Tensor) -> Tensor:
        rows = fetch_rows(self.weight, input.reshape(-1))
        return rows.view(*input.shape, self.embedding_dim).to(self.out_dtype)


class NarrowHead(nn.Linear):
    """Multiplies in the weight's type and gives fp32."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype)).float()


def can_be_narrow(model: Any) -> dict[str, nn.Module]:
    """Embedding and head by full name, if they are transformers' plain ones."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if (
        type(ends[0]) is not nn.Embedding
        or type(ends[1]) is not nn.Linear
        or ends[1].bias is not None
    ):
        return {}
    return {name: module for name, module in model.named_modules() if module in ends}


def make_narrow(model: Any, names: list[str], out_dtype: torch.dtype) -> None:
    """Replace the modules of these names by narrow ones with the same weight."""
    for name in names:
        module = model.get_submodule(name)
        narrow: NarrowEmbedding | NarrowHead
        if isinstance(module, nn.Embedding):
            narrow = NarrowEmbedding(
                module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta"
            )
            narrow.out_dtype = out_dtype
        else:
            narrow = NarrowHead(module.in_features, module.out_features, bias=False, device="meta")
        narrow.weight = module.weight
        model.set_submodule(name, narrow)


def embedding_to_host(model: Any) -> bool:
    """Keep the embedding in main memory, if it is a plain one that is not the head as well.

    Returns whether it is there now.
    """
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if type(embedding) not in (nn.Embedding, NarrowEmbedding) or head.weight is embedding.weight:
        return False
    name = next(name for name, module in model.named_modules() if module is embedding)
    host = HostEmbedding(
        embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta"
    )
    host.out_dtype = getattr(embedding, "out_dtype", embedding.weight.dtype)
    host.weight = nn.Parameter(pinned(embedding.weight.detach()), requires_grad=False)
    model.set_submodule(name, host)
    return True
