"""Attention with a key-value cache, lent to a model for the time of an answer.

Training attends over rows that lie end to end and keeps no cache. Generation is the other case:
a batch with padding on the left, one new token a row, and the keys and values of all tokens
before it kept. transformers has both the caches (full and sliding) and the masks for that; this
module registers an attention under a name of its own that takes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from halfbyte.model.attention import softcapped_attention

NAME = "halfbyte_cached"


def cached_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' ``sdpa`` attention, with two things that it leaves out.

    ``query`` [B, heads, new, D]; ``key``, ``value`` [B, kv_heads, seen, D]; ``attention_mask``
    bool [B, 1, new, seen] or None where the new tokens are causal among themselves. Query and key
    may come in fp32 (a rotary embedding computed in it) beside a value in 16 bits: the products
    are made in the value's type, as in training. Scores may be capped (Gemma 2), which sdpa
    refuses. Returns [B, new, heads, D].
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key = query.to(value.dtype), key.to(value.dtype)
    if softcap is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return out, None
    out = softcapped_attention(query, key, value, scaling, attention_mask, softcap)
    return out.transpose(1, 2).contiguous(), None


@contextmanager
def ready_to_generate(network: Any) -> Iterator[None]:
    """``network`` (a transformers causal LM) in evaluation mode, attending with a cache.

    The attention it had, and training mode where it was on, come back at the end, also after an
    error: an interrupted answer must not change the training that goes on.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, cached_attention)
    # Without a mask function of its own transformers would give this attention no mask.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    configs = {id(m.config): m.config for m in network.modules() if hasattr(m, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    training = network.training
    try:
        network.eval()
        for config, _ in before:
            config._attn_implementation = NAME
        yield
    finally:
        # Setting a config sets those within it too; the outer ones come first, so each ends right.
        for config, name in before:
            config._attn_implementation = name
        network.train(training)
