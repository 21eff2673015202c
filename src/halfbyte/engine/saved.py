"""How many bytes a forward pass keeps for its backward pass, by counting them."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.data.batch import Batch
from halfbyte.model.causal import QLoRAModel


def saved_bytes(model: QLoRAModel, batch: Batch) -> int:
    """Bytes of the tensors that autograd saves in one forward pass over ``batch``.

    A storage that several operations save counts once; weights and adapters do not count. The
    model and its adapter are left as they were.
    """
    ours = {p.untyped_storage().data_ptr() for p in model.network.parameters()}
    ours |= {b.untyped_storage().data_ptr() for b in model.network.buffers()}
    # By address: a storage that was freed could give its own to another, so all are held on to.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> None:
        # No backward pass follows, so nothing is given back. A tensor given back, or held here
        # itself, would hold the graph that holds this function, and the model would never be freed.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage

    training = model.network.training
    model.network.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        model.loss_sum(batch)
    model.network.train(training)
    return sum(storage.nbytes() for storage in kept.values())
