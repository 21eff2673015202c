"""A model's modules without its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from halfbyte.errors import ModelError
from halfbyte.model.experts import find_experts
from halfbyte.model.wording import reason

# Bytes of rotary frequencies, masks and the like; models have megabytes of them.
_MOST_COMPUTED = 8 << 30


def build_skeleton(config: Any, name: str) -> Any:
    """The transformers causal LM of ``config``, every tensor on the meta device.

    Raises ModelError where the configuration contradicts itself, or where the model is not made of
    linear layers, embeddings, vectors and experts of the usual kind alone.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            # A copy, since transformers writes the type and the attention into the config; and one
            # without the attention that the file names, which may be code on the hub.
            model = AutoModelForCausalLM.from_config(
                type(config).from_dict(config.to_dict()), trust_remote_code=False
            )
    except Exception as error:  # whatever a wrong figure in the configuration leads to
        raise ModelError(
            f"no model can be built from the configuration of {name}: {reason(error)}."
        ) from (error)
    _require_linear(model, name)
    return model.eval()


def quantized_linears(model: Any) -> dict[str, nn.Linear]:
    """The layers that are stored in 4 bits: every linear layer except the output head."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def make_buffers(model: Any, device: str) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies, embedding scales).

    transformers' models compute theirs in ``_init_weights``, as they must for its own loading,
    which starts on the meta device too. Weights that are there already are left alone by it.
    """
    made = [name for name, buffer in model.named_non_persistent_buffers() if buffer.is_meta]
    size = sum(model.get_buffer(name).nbytes for name in made)
    if size > _MOST_COMPUTED:
        raise ModelError(
            f"the configuration of {type(model).__name__} asks for {size:,} bytes of tables that "
            "are computed, where no model has so many: it is not one of its weights."
        )
    there = [*model.parameters(), *model.buffers()]
    for tensor in there:
        tensor._is_hf_initialized = True
    for name in made:
        owner, _, leaf = name.rpartition(".")
        value = torch.zeros_like(model.get_buffer(name), device=device)
        if value.is_floating_point():
            value.fill_(torch.nan)  # and none may be left below
        setattr(model.get_submodule(owner), leaf, value)
    model.initialize_weights()
    for name in made:
        if model.get_buffer(name).isnan().any():
            raise ModelError(
                f"{type(model).__name__} does not compute its buffer {name} when it is loaded, so "
                "it cannot be used; choose another model."
            )


def _require_linear(model: Any, name: str) -> None:
    known = {id(p) for experts in find_experts(model).values() for p in experts.parameters()}
    odd = [n for n, p in model.named_parameters() if p.dim() > 2 and id(p) not in known]
    if odd:
        raise ModelError(
            f"{name} ({type(model).__name__}) has weights that are neither linear layers, "
            f"embeddings nor experts of the usual kind ({odd[0]}), as convolutions and experts "
            "with biases are; halfbyte does not train such models."
        )
    if not quantized_linears(model):
        raise ModelError(
            f"{name} ({type(model).__name__}) has no linear layers that could be stored in 4 bits "
            "and adapted; choose another model."
        )
