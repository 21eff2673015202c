"""Attention over rows that lie end to end, never across a row's border.

Registered with transformers under the name ``halfbyte_varlen``. transformers builds a mask only
for the names it knows and passes none, silently, to others; causality, borders and the sliding
window are therefore this function's own business, and a call without borders is an error.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from halfbyte.model.varlen import DeviceRows, NoKernelError, attention_on_device

NAME = "halfbyte_varlen"


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    row_borders: list[int] | DeviceRows | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal self-attention within each row.

    ``query`` [1, heads, T, D]; ``key``, ``value`` [1, kv_heads, T, D]; ``row_borders`` the
    cumulative lengths [0, …, T] of the rows on the host (those of length 0 are passed over), or
    rows that the device alone knows, for the kernels of :mod:`halfbyte.model.varlen`. Query and key
    come in fp32 where the rotary embedding was computed in it, and are brought to the value's type,
    which is the type of the products. Returns [1, T, heads, D].

    Raises ValueError without ``row_borders``, with a mask, or with attention sinks (``s_aux``):
    there is nothing right to do. Raises NoKernelError where rows lie on the device and no kernel
    does what is asked.
    """
    if row_borders is None:
        raise ValueError(f"{NAME} needs row_borders: without them rows would see each other")
    if attention_mask is not None:
        raise ValueError(f"{NAME} takes no attention mask: the borders say it all")
    if s_aux is not None:
        raise ValueError(f"{NAME} knows no attention sinks")
    if isinstance(row_borders, DeviceRows):
        if softcap is not None:
            raise NoKernelError("its attention caps the scores")
        return attention_on_device(query, key, value, row_borders, scaling, sliding_window), None
    query, key = query.to(value.dtype), key.to(value.dtype)
    rows = [
        _row_attention(
            query[:, :, start:stop],
            key[:, :, start:stop],
            value[:, :, start:stop],
            scaling,
            sliding_window,
            softcap,
        )
        for start, stop in pairwise(row_borders)
        if stop > start
    ]
    out = rows[0] if len(rows) == 1 else torch.cat(rows, dim=2)
    return out.transpose(1, 2).contiguous(), None


def _row_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    length = q.shape[2]
    mask = None
    if window is not None and length > window:
        at = torch.arange(length, device=q.device)
        apart = at[:, None] - at[None, :]
        mask = (apart >= 0) & (apart < window)
    if softcap is not None:
        return softcapped_attention(q, k, v, scaling, mask, softcap)
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )


def softcapped_attention(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, mask: Tensor | None, softcap: float
) -> Tensor:
    """Attention with scores cap · tanh(s / cap) (Gemma 2, arXiv 2408.00118, section 2).

    ``q`` [B, heads, new, D]; ``k``, ``v`` [B, kv_heads, seen, D]; ``mask`` bool, true where seen,
    or None where the new tokens are the last of those seen. Returns [B, heads, new, D].
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh((q @ k.transpose(2, 3)).float() * scale / softcap)
    if mask is None:
        new, seen = scores.shape[2:]
        mask = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)
    # The lowest number, not -inf: a padded query sees nothing, and 0 / 0 would be NaN.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1).to(v.dtype) @ v


def use_varlen_attention(model: Any) -> None:
    """Make ``model`` (a transformers model) attend through this module."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, varlen_attention)
    set_attention(model, NAME)


def set_attention(model: Any, name: str) -> None:
    """Make ``model`` attend by the implementation of that name, in all its parts."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in configs.values():
        config._attn_implementation = name
