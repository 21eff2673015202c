"""Attention by PyTorch's memory-efficient operators: against fp64, or without a GPU the call."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attention_case import DEVICE, F16, TOLERANCE, Case, check

# isort: split
from halfbyte.kernels import attention_efficient as efficient
from halfbyte.kernels.attention import attention_reference


class OperatorInPlainPyTorch(TorchDispatchMode):
    """Stands for the memory-efficient operators, which a CPU does not have.

    By the schema's names; their layout as in PyTorch's own derivative formulas: q, k and v [1, T,
    heads, D], log-sums [rows, heads, ⌈longest / 32⌉ · 32].
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not name.startswith("_efficient_attention"):
            return func(*args, **(kwargs or {}))
        names = [a.name for a in func._schema.arguments]
        given_ = dict(zip(names, args, strict=False)) | (kwargs or {})
        q, k, v = (given_[n] for n in ("query", "key", "value"))
        assert q.shape == k.shape == v.shape
        assert given_["custom_mask_type"] == 1
        assert given_["dropout_p"] == 0
        longest, borders = given_["max_seqlen_q"], given_["cu_seqlens_q"]
        assert longest == given_["max_seqlen_k"] <= q.shape[1]
        _, T, heads, head_dim = q.shape
        call = (borders, longest, heads, heads, head_dim, given_["scale"])
        qkv = torch.cat((q, k, v), 2)[0].reshape(T, -1).double()
        out = qkv.new_empty(T, heads * head_dim)
        lse = qkv.new_empty(heads, T)
        window = given_.get("window_size")  # a mode is given no arguments that are their defaults
        attention_reference(qkv, *call, out, lse, window=window)
        padded = torch.full((len(borders) - 1, heads, -(-longest // 32) * 32), math.inf)
        for row, (start, stop) in enumerate(pairwise(borders.tolist())):
            padded[row, :, : stop - start] = lse[:, start:stop]
        if name == "_efficient_attention_forward":
            assert given_["compute_log_sumexp"]
            state = torch.zeros((), dtype=torch.int64)
            return out.to(q.dtype).view(q.shape), padded, state, state, longest, longest
        assert given_["num_splits_key"] == 1
        assert given_["out"].is_contiguous()
        torch.testing.assert_close(given_["logsumexp"], padded)
        grads = self._backward(qkv, given_["grad_out_"], lse, borders, given_["scale"], window)
        return *(g.to(q.dtype)[None] for g in grads), torch.empty(())

    @staticmethod
    def _backward(
        qkv: Tensor, d_out: Tensor, lse: Tensor, borders: Tensor, scale: float, window: int | None
    ) -> list[Tensor]:
        """dq, dk and dv [T, heads, D]; autograd is out of reach within a mode."""
        _, T, heads, head_dim = d_out.shape
        q, k, v = qkv.view(T, 3, heads, head_dim).permute(1, 2, 0, 3)
        d_o = d_out[0].double().transpose(0, 1)
        row = (torch.arange(T)[:, None] >= borders[1:]).sum(1)
        back = torch.arange(T)[:, None] - torch.arange(T)
        seen = (row[:, None] == row) & (back >= 0) & (back < (window or T))
        p = (q @ k.mT * scale - lse[:, :, None]).exp() * seen
        dp = d_o @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        return [t.transpose(0, 1) for t in (ds @ k, ds.mT @ q, p.mT @ d_o)]


def run_efficient(case: Case) -> dict[str, Tensor]:
    found = case.run(efficient.attention, efficient.attention_backward, efficient.lse_shape)
    starts = case.cu_seqlens.tolist()
    rows = [found["lse"][i, :, : b - a] for i, (a, b) in enumerate(pairwise(starts))]
    return {**found, "lse": torch.cat(rows, 1)}


def wanted_of_efficient(case: Case) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in case.expected().items() if name != "delta"}


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_the_memory_efficient_operator_is_called_as_its_schema_says(
    kv_heads: int, window: int | None
) -> None:
    case = Case([4, 0, 39, 1], 4, kv_heads, window=window, max_seqlen=500)
    if DEVICE == "cuda":
        pytest.skip("has the operator itself")
    with OperatorInPlainPyTorch():
        found = run_efficient(case)
    check(found, wanted_of_efficient(case), 2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 4, 64), (8, 1, 64), (4, 2, 80), (2, 1, 128)]
)
def test_memory_efficient_attention(
    heads: int, kv_heads: int, head_dim: int, window: int | None
) -> None:
    lengths = [3, 0, 200, 1, 0, 64, 17]
    case = Case(lengths, heads, kv_heads, head_dim, F16, window)
    first, again = run_efficient(case), run_efficient(case)
    check(first, wanted_of_efficient(case), TOLERANCE[F16])
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(first[name], again[name]), name
