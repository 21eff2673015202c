"""Rows of a table that may lie in the host's memory: out_t = table[ids_t].

A GPU reads pinned host memory by itself, over the bus: the embeddings of 768 tokens of a model of
width 2,048 are 3 MB, about 0.1 ms, and the table's 131 MB need not be on the GPU. The host is not
asked for anything, so that the kernel can be part of a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.triton_shim import INSTALLED, tl, triton


def fetch_rows(table: Tensor, ids: Tensor) -> Tensor:
    """The rows ``ids`` [T] of ``table``, on the device of ``ids``: [T, H]."""
    out = torch.empty(len(ids), table.shape[1], dtype=table.dtype, device=ids.device)
    gather = gather_rows if INSTALLED and ids.device.type == "cuda" else gather_rows_reference
    gather(table, ids, out)
    return out


def gather_rows_reference(table: Tensor, ids: Tensor, out: Tensor) -> None:
    """What :func:`gather_rows` does, through the host where the table is there."""
    out.copy_(table.index_select(0, ids.to(table.device)))


def gather_rows(table: Tensor, ids: Tensor, out: Tensor) -> None:
    """Fill ``out`` [T, H] with the rows ``ids`` int64 [T] of ``table`` [rows, H], of one type.

    ``table`` lies on the device or in pinned host memory.
    """
    width = table.shape[1]
    block = min(2048, triton.next_power_of_2(width))
    _gather_rows[(len(ids), triton.cdiv(width, block))](
        table, ids, out, table.stride(0), out.stride(0), WIDTH=width, BLOCK=block, num_warps=4
    )


@triton.jit
def _gather_rows(  # type: ignore[no-untyped-def]
    table, ids, out, stride, out_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + token).to(tl.int64)
    inside = column < WIDTH
    value = tl.load(table + row * stride + column, mask=inside, other=0.0)
    tl.store(out + token * out_stride + column, value, mask=inside)


def pinned(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` in host memory that a GPU can read; plain memory where there is none."""
    host = torch.empty(
        tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available(), device="cpu"
    )
    return host.copy_(tensor)
