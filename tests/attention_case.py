"""Random rows for the tests of attention, and what attention gives for them in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_interpreter import DEVICE

# isort: split
from halfbyte.kernels import attention as file
from halfbyte.kernels.attention import attention_backward_reference, attention_reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
LOOK = "nothing may be written here"
POISON = 77.0
# Of the largest element: what rounding the products' operands and the results may cost.
TOLERANCE = {F32: 4e-6, F16: 2e-3, BF16: 1.6e-2}


class Case:
    """Random rows with their gradients upstream, and the results in fp64."""

    def __init__(
        self,
        lengths: Sequence[int],
        heads: int = 2,
        kv_heads: int = 1,
        head_dim: int = 16,
        dtype: torch.dtype = F32,
        window: int | None = None,
        max_seqlen: int | None = None,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.T, self.rows = sum(lengths), len(lengths)
        self.heads, self.kv_heads, self.head_dim, self.dtype = heads, kv_heads, head_dim, dtype
        self.window, self.max_seqlen = window, max_seqlen or max([*lengths, 1])
        self.scale = 1.3 / math.sqrt(head_dim)
        self.width, self.out_width = (heads + 2 * kv_heads) * head_dim, heads * head_dim
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
        self.qkv = torch.randn(self.T, self.width, generator=generator).to(DEVICE, dtype)
        self.d_out = torch.randn(self.T, self.out_width, generator=generator).to(DEVICE, dtype)

    def args(self) -> tuple[Any, ...]:
        return (self.max_seqlen, self.heads, self.kv_heads, self.head_dim, self.scale)

    def run(
        self, forward: Any = None, backward: Any = None, shape: Any = None
    ) -> dict[str, Tensor]:
        """What the kernels write, between values that they neither read nor write."""
        forward, backward = forward or file.attention, backward or file.attention_backward
        shape = (shape or file.lse_shape)(self.T, self.rows, self.max_seqlen, self.heads)
        lse = torch.full(shape, math.nan, device=DEVICE)
        delta = torch.full((self.heads, self.T), math.nan, device=DEVICE)
        qkv, d_out = self._between(self.qkv, math.nan), self._between(self.d_out, math.nan)
        out = self._between(torch.full_like(self.d_out, math.nan), POISON)
        d_qkv = self._between(torch.full_like(self.qkv, math.nan), POISON)
        borders = self.cu_seqlens
        forward(qkv, borders, *self.args(), out, lse, window=self.window)
        backward(d_out, qkv, out, lse, borders, *self.args(), d_qkv, delta, window=self.window)
        for view in (out, d_qkv):
            whole = view._base
            assert whole is not None
            assert (whole[0] == POISON).all(), LOOK
            assert (whole[-1] == POISON).all(), LOOK
            assert (whole[:, view.shape[1] :] == POISON).all(), LOOK
        return {"out": out, "lse": lse, "delta": delta, **self.parts(d_qkv)}

    def parts(self, d_qkv: Tensor) -> dict[str, Tensor]:
        widths = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        return dict(zip(("dq", "dk", "dv"), d_qkv.split(widths, 1), strict=True))

    def expected(self) -> dict[str, Tensor]:
        """The reference in fp64."""
        qkv, d_out = self.qkv.double(), self.d_out.double()
        out, d_qkv = torch.full_like(d_out, math.nan), torch.full_like(qkv, math.nan)
        lse, delta = (out.new_full((self.heads, self.T), math.nan) for _ in range(2))
        call = (*self.args(),)
        attention_reference(qkv, self.cu_seqlens, *call, out, lse, window=self.window)
        attention_backward_reference(
            d_out, qkv, out, lse, self.cu_seqlens, *call, d_qkv, delta, window=self.window
        )
        return {"out": out, "lse": lse, "delta": delta, **self.parts(d_qkv)}

    @staticmethod
    def _between(value: Tensor, around: float) -> Tensor:
        rows, columns = value.shape
        whole = torch.full((rows + 2, columns + 8), around, dtype=value.dtype, device=DEVICE)
        view = whole[1:-1, :columns]
        view.copy_(value)
        return view


def check(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, want in expected.items():
        bound = 2e-6 if name == "lse" else tolerance
        # Where each query sees one key only, dq is 0; rounding leaves what it does of 1.
        error = (found[name].double() - want).abs().max() / want.abs().max().clamp(min=1)
        assert error <= bound, f"{name}: {error:.2e}"
