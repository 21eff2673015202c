"""Which networks can be made of fused layers: those whose layers are Llama's.

The plan asks it of a network without weights, the fused network of one with them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

# transformers' decoder layers that are: norm, attention with rotary positions, sum, norm, gated
# MLP, sum, and nothing else.
LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
# Kinds of rotary embedding whose angles do not depend on the length of what is read.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
NOT_ALL_IN_NF4 = "its checkpoint keeps some of its linear layers in 16 bits"


def why_not_fused(network: Any) -> str | None:
    """What of a transformers causal LM no fused layer does, in words; None where all is known."""
    base, config = network.base_model, network.config.get_text_config()
    layers = getattr(base, "layers", None)
    if layers is None:
        return f"{type(base).__name__} is no decoder of the kind that is known"
    for layer in layers:
        if type(layer).__name__ not in LAYERS:
            return f"its layers are {type(layer).__name__}"
    if config.hidden_act not in ACTIVATIONS:
        return f"its activation is {config.hidden_act}"
    rope = getattr(base.rotary_emb, "rope_type", "default")
    if rope not in ROPE_TYPES:
        return f"its rotary embedding ({rope}) depends on the length"
    return None


TRAINED_ENDS = (
    "rows of the embedding or the head are trained too (lora.modules_to_save, model.new_tokens)"
)


def why_adapters_not_fused(
    ranks: Collection[int], scales: Collection[float], use_dora: bool
) -> str | None:
    """The same of the adapters, by the rank and the factor of each."""
    if use_dora:
        return "DoRA (lora.use_dora) divides by the norms of weights that change in each step"
    if len(set(ranks)) > 1:
        return "its adapters have different ranks (lora.rank_pattern)"
    if len(set(scales)) > 1:
        return "its adapters have different factors (lora.alpha_pattern)"
    return None
