"""The adapters' thin products of layers that share an input, in three launches.

Layers i = 1 … n (q, k and v, say) have a common input x [T, K], rank r and factor s. Their base
weights lie end to end by rows and the adapters are folded in as further columns, so that one large
product makes y and another one its gradient. With W' = [W | diag(s B_i)] and x' = [x | u_1 … u_n]:

    u_i = drop_i(x) A_iᵀ         y = x' W'ᵀ         [dx₀ | g_1 … g_n] = dy W'

    dx = dx₀ + Σ_i mask_i ⊙ (g_i A_i) / (1 - p)     dA_i = g_iᵀ drop_i(x)     dB_i = s dy_iᵀ u_i

What is left is here: u (:func:`lora_down`), the sum in dx (:func:`lora_grad_input`), dA and dB
(:func:`lora_grads`) and writing s B into W' (:func:`fold_b`), with each mask made again where it is
needed (:mod:`halfbyte.kernels.dropout`). Each element of the results is summed by one program in
one order, so the same inputs give the same bits. :mod:`halfbyte.kernels.lora_group_plain` has the
same functions on PyTorch's products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.dropout import drop_threshold
from halfbyte.kernels.lora_group_kernels import (
    fold_b_kernel,
    lora_down_kernel,
    lora_grad_input_kernel,
    lora_grads_kernel,
    sum_down_kernel,
    sum_grads_kernel,
)
from halfbyte.kernels.triton_shim import triton


@dataclass(frozen=True)
class LoraPart:
    """One layer of a group: where its A and B begin in the flat parameters (elements), its rows
    in the joined weight, and its number, which names its dropout mask."""

    a: int
    b: int
    first_row: int
    rows: int
    module: int


@dataclass(frozen=True)
class LoraGroup:
    """The adapters of layers that share their input of ``columns`` elements.

    ``parts`` says where each lies and ``table`` says it on the device, int64 [n, 5]. ``values``
    are the flat parameters in fp32, ``shadow`` the same rounded to the products' type, ``grad``
    fp32 their gradients, which are added to. ``extra`` is the number of columns that the group
    adds to the weight and to its input, at least n · r; those beyond stay zero.
    """

    parts: tuple[LoraPart, ...]
    table: Tensor
    values: Tensor
    shadow: Tensor
    grad: Tensor
    columns: int
    extra: int
    r: int
    scale: float
    p: float

    @property
    def keep_scale(self) -> float:
        """What a kept element is multiplied by: 1 / (1 - p)."""
        return 1.0 / (1.0 - self.p)

    def views(self, flat: Tensor, part: LoraPart) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [rows, r] of one layer in ``flat``, laid out as the parameters are."""
        a = flat[part.a : part.a + self.r * self.columns].view(self.r, self.columns)
        b = flat[part.b : part.b + part.rows * self.r].view(part.rows, self.r)
        return a, b


def part_table(parts: Sequence[LoraPart], device: torch.device) -> Tensor:
    """``parts`` as the kernels read them."""
    rows = [[p.a, p.b, p.first_row, p.rows, p.module] for p in parts]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def lora_down(x: Tensor, group: LoraGroup, keys: Tensor | None) -> None:
    """Write u_1 … u_n into ``x`` [T, columns + extra], whose first columns hold the input.

    ``keys`` int32 [modules, 2] names the masks (:func:`~halfbyte.kernels.dropout.dropout_keys`);
    None drops nothing. Any row stride.
    """
    tokens, n, rank = len(x), len(group.parts), _rank(group.r)
    drop = keys is not None and group.p > 0.0
    block_t, block_k = 64, min(128, triton.next_power_of_2(group.columns))
    # A few hundred tokens give too few programs for a long sum each: it is split, and the parts
    # are added in a second launch. q, k and v of TinyLlama took 23 µs in one, 7 in two.
    row_blocks, steps = triton.cdiv(tokens, block_t), triton.cdiv(group.columns, block_k)
    splits = _splits(row_blocks * n, steps)
    parts = x if splits == 1 else x.new_empty(splits, tokens, n * group.r, dtype=torch.float32)
    keep_scale = group.keep_scale if drop else 1.0
    lora_down_kernel[(row_blocks, n * splits)](
        x,
        parts,
        group.shadow,
        group.table,
        keys if drop else group.table,
        tokens,
        x.stride(0),
        keep_scale,
        drop_threshold(group.p),
        K=group.columns,
        EXTRA=group.extra,
        N=n,
        RANK=group.r,
        DROP=drop,
        SPLITS=splits,
        STEPS=triton.cdiv(steps, splits),
        BT=block_t,
        BK=block_k,
        R=rank,
        PAD=triton.next_power_of_2(max(1, group.extra - n * group.r)),
        EXACT=_exact(x),
        num_warps=4,
    )
    if splits > 1:
        sum_down_kernel[(triton.cdiv(tokens, 8),)](
            parts,
            x,
            tokens,
            x.stride(0),
            keep_scale,
            K=group.columns,
            EXTRA=group.extra,
            WIDTH=n * group.r,
            SPLITS=splits,
            BLOCK=triton.next_power_of_2(group.extra),
            num_warps=4,
        )


def lora_grad_input(d_x: Tensor, group: LoraGroup, keys: Tensor | None) -> None:
    """Add the adapters' part to ``d_x`` [T, columns + extra], which holds [dx₀ | g_1 … g_n]."""
    tokens, rank = len(d_x), _rank(group.r)
    drop = keys is not None and group.p > 0.0
    block_t, block_k = 32, min(128, triton.next_power_of_2(group.columns))
    lora_grad_input_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(group.columns, block_k))](
        d_x,
        group.shadow,
        group.table,
        keys if drop else group.table,
        tokens,
        d_x.stride(0),
        group.keep_scale if drop else 1.0,
        drop_threshold(group.p),
        K=group.columns,
        N=len(group.parts),
        RANK=group.r,
        DROP=drop,
        BT=block_t,
        BK=block_k,
        R=rank,
        EXACT=_exact(d_x),
        num_warps=4,
    )


def lora_grads(x: Tensor, d_x: Tensor, d_y: Tensor, group: LoraGroup, keys: Tensor | None) -> None:
    """Add dA and dB to ``group.grad``.

    ``x`` [T, columns + extra] as the forward product had it, ``d_x`` of the same shape with g in
    its last columns, ``d_y`` [T, rows]. Any row strides.
    """
    tokens, n, rank = len(x), len(group.parts), _rank(group.r)
    drop = keys is not None and group.p > 0.0
    block_t, block_m = 64, 64
    widest = max(group.columns, *(part.rows for part in group.parts))
    blocks = triton.cdiv(widest, block_m)
    used = n * triton.cdiv(group.columns, block_m) + sum(
        triton.cdiv(part.rows, block_m) for part in group.parts
    )
    steps = triton.cdiv(tokens, block_t)
    splits = _splits(used, steps)
    steps = triton.cdiv(steps, splits)
    parts = group.grad
    if splits > 1:
        parts = x.new_empty(splits, 2 * n, blocks, rank, block_m, dtype=torch.float32)
    keep_scale = group.keep_scale if drop else 1.0
    sizes = {"K": group.columns, "N": n, "RANK": group.r, "BM": block_m, "R": rank}
    lora_grads_kernel[(blocks, 2 * n, splits)](
        x,
        d_x,
        d_y,
        group.grad,
        parts,
        group.table,
        keys if drop else group.table,
        tokens,
        steps * block_t,
        x.stride(0),
        d_x.stride(0),
        d_y.stride(0),
        keep_scale,
        group.scale,
        drop_threshold(group.p),
        **sizes,
        DROP=drop,
        SPLIT=splits > 1,
        BT=block_t,
        EXACT=_exact(x),
        num_warps=4,
        num_stages=3,
    )
    if splits > 1:
        sum_grads_kernel[(blocks, 2 * n)](
            parts, group.grad, group.table, keep_scale, group.scale, **sizes, SPLITS=splits
        )


@dataclass(frozen=True)
class Fold:
    """Weights W' [rows, columns + extra] and the groups whose B is written into each.

    ``table`` int64 [layers, 4] says it on the device: address, row stride in elements, rows, and
    where B begins in the parameters. It holds as long as no weight is moved.
    """

    entries: tuple[tuple[LoraGroup, Tensor], ...]
    table: Tensor


def make_fold(entries: Sequence[tuple[LoraGroup, Tensor]]) -> Fold:
    """For :func:`fold_b`: groups of the same rank, scale and parameters, at least one."""
    found = []
    for group, weight in entries:
        for i, part in enumerate(group.parts):
            at = weight[part.first_row :, group.columns + i * group.r :]
            found.append([at.data_ptr(), weight.stride(0), part.rows, part.b])
    table = torch.tensor(found, dtype=torch.int64, device=entries[0][1].device)
    return Fold(tuple(entries), table)


def fold_b(fold: Fold) -> None:
    """Write s · B of every group into its weight, in one launch whatever their number."""
    group, weight = fold.entries[0]
    block = 32
    widest = max(part.rows for group, _ in fold.entries for part in group.parts)
    fold_b_kernel[(triton.cdiv(widest, block), len(fold.table))](
        group.values,
        fold.table,
        weight,
        group.scale,
        RANK=group.r,
        BLOCK=block,
        R=triton.next_power_of_2(group.r),
        num_warps=4,
    )


# Programs that keep a GPU of 132 multiprocessors busy while each waits for memory. A constant: how
# sums are split must not depend on the card.
_ENOUGH_PROGRAMS = 512


def _splits(programs: int, steps: int) -> int:
    """In how many parts each program's loop of ``steps`` is divided among further programs."""
    wanted = min(steps, max(1, _ENOUGH_PROGRAMS // programs))
    return triton.cdiv(steps, triton.cdiv(steps, wanted))


def _rank(r: int) -> int:
    return max(16, triton.next_power_of_2(r))


def _exact(x: Tensor) -> bool:
    """fp32 products in fp32, where Triton would take tf32."""
    return x.dtype == torch.float32
