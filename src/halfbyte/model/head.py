"""How hidden states become logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from halfbyte.errors import ModelError


@dataclass(frozen=True)
class Head:
    """``softcap · tanh(scale · h Wᵀ / softcap)``."""

    weight: Tensor  # [vocab, hidden]
    scale: float
    softcap: float | None


def find_head(network: Any) -> Head:
    """The head of a transformers causal LM; raises ModelError where it is not one matrix."""
    config = network.config.get_text_config()
    head = network.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None or network.base_model is network:
        raise ModelError(
            f"the output head of {type(network).__name__} is not one matrix on top of its decoder, "
            "which is what halfbyte trains; choose another model."
        )
    # Granite divides its logits, Cohere multiplies them, Gemma 2 caps them.
    scale = getattr(config, "logit_scale", None) or 1.0 / (
        getattr(config, "logits_scaling", None) or 1.0
    )
    return Head(head.weight, float(scale), getattr(config, "final_logit_softcapping", None))
