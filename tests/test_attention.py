"""Attention within rows, against transformers' eager attention under a mask of blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from halfbyte.model.attention import use_varlen_attention, varlen_attention

BORDERS = [0, 9, 10, 10, 33, 47, 47, 47]  # a row of one token, rows of none


class Module(torch.nn.Module):
    """What transformers' function reads of the layer."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.head_dim = 16


def block_mask(window: int | None) -> Tensor:
    """[1, 1, T, T], 0 where a token sees another and -inf where not, written out."""
    mask = torch.full((47, 47), float("-inf"), dtype=torch.float64)
    row = [sum(border <= t for border in BORDERS[1:]) for t in range(47)]
    for i in range(47):
        for j in range(47):
            if row[i] == row[j] and j <= i and (window is None or i - j < window):
                mask[i, j] = 0.0
    return mask[None, None]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 5, 23, 100])
@pytest.mark.parametrize(("scaling", "softcap"), [(16**-0.5, None), (0.5, None), (0.25, 3.0)])
def test_it_is_the_eager_attention(
    kv_heads: int, window: int | None, scaling: float, softcap: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, 47, 16) for heads in (4, kv_heads, kv_heads)]
    doubles = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    singles = [t.float().requires_grad_() for t in doubles]
    doubles = [t.requires_grad_() for t in doubles]
    module = Module(4 // kv_heads)
    expected, _ = eager_attention_forward(
        module, *doubles, block_mask(window), scaling=scaling, softcap=softcap
    )
    out, weights = varlen_attention(
        module,
        *singles,
        None,
        scaling=scaling,
        sliding_window=window,
        softcap=softcap,
        row_borders=BORDERS,
    )
    assert weights is None
    assert out.shape == (1, 47, 4, 16)
    # transformers takes the softmax in fp32.
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    got = torch.autograd.grad(out, singles, upstream.float())
    want = torch.autograd.grad(expected, doubles, upstream)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)


def test_without_borders_or_with_a_mask_it_is_an_error() -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    network = LlamaForCausalLM(config)
    use_varlen_attention(network)
    ids = torch.arange(6)[None]
    network(input_ids=ids, row_borders=[0, 2, 6])
    with pytest.raises(ValueError, match="row_borders"):
        network(input_ids=ids)
    q = torch.zeros(1, 2, 6, 16)
    with pytest.raises(ValueError, match="no attention mask"):
        varlen_attention(network, q, q, q, torch.zeros(6, 6), row_borders=[0, 6])
