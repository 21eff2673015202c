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

from halfbyte.kernels.dropout import drop_threshold, kept_pairs
from halfbyte.kernels.triton_shim import tl, triton


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
    # 16 rows a program: at 768 tokens q, k and v together are then 144 programs for 132 SMs.
    block_t, block_k = 16, min(256, triton.next_power_of_2(group.columns))
    pad = 1 if group.extra > n * group.r else 0
    _lora_down[(triton.cdiv(tokens, block_t), n + pad)](
        x,
        group.shadow,
        group.table,
        keys if drop else group.table,
        tokens,
        x.stride(0),
        group.keep_scale if drop else 1.0,
        drop_threshold(group.p),
        K=group.columns,
        EXTRA=group.extra,
        N=n,
        RANK=group.r,
        DROP=drop,
        BT=block_t,
        BK=block_k,
        R=rank,
        PAD=triton.next_power_of_2(max(1, group.extra - n * group.r)),
        EXACT=_exact(x),
        num_warps=4,
    )


def lora_grad_input(d_x: Tensor, group: LoraGroup, keys: Tensor | None) -> None:
    """Add the adapters' part to ``d_x`` [T, columns + extra], which holds [dx₀ | g_1 … g_n]."""
    tokens, rank = len(d_x), _rank(group.r)
    drop = keys is not None and group.p > 0.0
    block_t, block_k = 32, min(128, triton.next_power_of_2(group.columns))
    _lora_grad_input[(triton.cdiv(tokens, block_t), triton.cdiv(group.columns, block_k))](
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
    block_m = 64
    widest = max(group.columns, *(part.rows for part in group.parts))
    _lora_grads[(triton.cdiv(widest, block_m), 2 * n)](
        x,
        d_x,
        d_y,
        group.grad,
        group.table,
        keys if drop else group.table,
        tokens,
        x.stride(0),
        d_x.stride(0),
        d_y.stride(0),
        group.keep_scale if drop else 1.0,
        group.scale,
        drop_threshold(group.p),
        K=group.columns,
        N=n,
        RANK=group.r,
        DROP=drop,
        BT=64,
        BM=block_m,
        R=rank,
        EXACT=_exact(x),
        num_warps=4,
        num_stages=3,
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
    _fold_b[(triton.cdiv(widest, block), len(fold.table))](
        group.values,
        fold.table,
        weight,
        group.scale,
        RANK=group.r,
        BLOCK=block,
        R=triton.next_power_of_2(group.r),
        num_warps=4,
    )


def _rank(r: int) -> int:
    return max(16, triton.next_power_of_2(r))


def _exact(x: Tensor) -> bool:
    """fp32 products in fp32, where Triton would take tf32."""
    return x.dtype == torch.float32


@triton.jit
def _kept(rows, first, multiplier, offset, threshold, K: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The mask of a tile: [rows, BK] from column ``first``, an even number, on."""
    column = (first // 2 + tl.arange(0, BK // 2)).to(tl.uint32)
    pair = rows.to(tl.uint32)[:, None] * (K // 2) + column[None, :]
    even, odd = kept_pairs(pair, multiplier, offset, threshold)
    return tl.interleave(even, odd)


@triton.jit(do_not_specialize=["T"])
def _lora_down(  # type: ignore[no-untyped-def]
    x,
    shadow,
    table,
    keys,
    T,
    stride,
    keep_scale,
    threshold,
    K: tl.constexpr,
    EXTRA: tl.constexpr,
    N: tl.constexpr,
    RANK: tl.constexpr,
    DROP: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    PAD: tl.constexpr,
    EXACT: tl.constexpr,
):
    i = tl.program_id(1)
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    live = (rows < T)[:, None]
    at = x + rows.to(tl.int64)[:, None] * stride
    if i == N:
        pad = N * RANK + tl.arange(0, PAD)[None, :]
        zero = tl.zeros((BT, PAD), x.dtype.element_ty)
        tl.store(at + K + pad, zero, mask=live & (pad < EXTRA))
    else:
        rank = tl.arange(0, R)
        a = shadow + tl.load(table + i * 5)
        acc = tl.zeros((BT, R), tl.float32)
        multiplier = tl.full((), 0, tl.uint32)
        offset = tl.full((), 0, tl.uint32)
        if DROP:
            key = keys + 2 * tl.load(table + i * 5 + 4)
            multiplier = tl.load(key).to(tl.uint32, bitcast=True)
            offset = tl.load(key + 1).to(tl.uint32, bitcast=True)
        for first in range(0, K, BK):
            columns = first + tl.arange(0, BK)
            inside = (columns < K)[None, :]
            value = tl.load(at + columns[None, :], mask=live & inside, other=0.0)
            if DROP:
                kept = _kept(rows, first, multiplier, offset, threshold, K, BK)
                value = tl.where(kept, value, 0.0)
            weight = tl.load(
                a + rank[None, :] * K + columns[:, None],
                mask=(columns < K)[:, None] & (rank < RANK)[None, :],
                other=0.0,
            )
            acc = tl.dot(value, weight, acc, input_precision="ieee" if EXACT else "tf32")
        out = (acc * keep_scale).to(x.dtype.element_ty)
        tl.store(at + K + i * RANK + rank[None, :], out, mask=live & (rank < RANK)[None, :])


@triton.jit(do_not_specialize=["T"])
def _lora_grad_input(  # type: ignore[no-untyped-def]
    d_x,
    shadow,
    table,
    keys,
    T,
    stride,
    keep_scale,
    threshold,
    K: tl.constexpr,
    N: tl.constexpr,
    RANK: tl.constexpr,
    DROP: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    EXACT: tl.constexpr,
):
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    first = tl.program_id(1) * BK
    columns = first + tl.arange(0, BK)
    rank = tl.arange(0, R)
    live, inside, ranked = (rows < T)[:, None], (columns < K)[None, :], rank < RANK
    at = d_x + rows.to(tl.int64)[:, None] * stride
    total = tl.zeros((BT, BK), tl.float32)
    for i in tl.static_range(N):
        a = shadow + tl.load(table + i * 5)
        g = tl.load(at + K + i * RANK + rank[None, :], mask=live & ranked[None, :], other=0.0)
        weight = tl.load(
            a + rank[:, None] * K + columns[None, :], mask=ranked[:, None] & inside, other=0.0
        )
        part = tl.dot(g, weight, input_precision="ieee" if EXACT else "tf32")
        if DROP:
            key = keys + 2 * tl.load(table + i * 5 + 4)
            multiplier = tl.load(key).to(tl.uint32, bitcast=True)
            offset = tl.load(key + 1).to(tl.uint32, bitcast=True)
            kept = _kept(rows, first, multiplier, offset, threshold, K, BK)
            part = tl.where(kept, part, 0.0)
        total += part
    mask = live & inside
    old = tl.load(at + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    new = (old + total * keep_scale).to(d_x.dtype.element_ty)
    tl.store(at + columns[None, :], new, mask=mask)


@triton.jit(do_not_specialize=["T"])
def _lora_grads(  # type: ignore[no-untyped-def]
    x,
    d_x,
    d_y,
    grad,
    table,
    keys,
    T,
    stride_x,
    stride_dx,
    stride_dy,
    keep_scale,
    scale,
    threshold,
    K: tl.constexpr,
    N: tl.constexpr,
    RANK: tl.constexpr,
    DROP: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    R: tl.constexpr,
    EXACT: tl.constexpr,
):
    which = tl.program_id(1)
    first = tl.program_id(0) * BM
    columns = first + tl.arange(0, BM)
    rank = tl.arange(0, R)
    ranked = (rank < RANK)[None, :]
    acc = tl.zeros((R, BM), tl.float32)
    if which < N:
        # dA [r, K] = gᵀ drop(x)
        i = which
        inside = (columns < K)[None, :]
        multiplier = tl.full((), 0, tl.uint32)
        offset = tl.full((), 0, tl.uint32)
        if DROP:
            key = keys + 2 * tl.load(table + i * 5 + 4)
            multiplier = tl.load(key).to(tl.uint32, bitcast=True)
            offset = tl.load(key + 1).to(tl.uint32, bitcast=True)
        if first < K:
            for t in range(0, T, BT):
                rows = t + tl.arange(0, BT)
                live = (rows < T)[:, None]
                at = rows.to(tl.int64)[:, None]
                g = tl.load(
                    d_x + at * stride_dx + K + i * RANK + rank[None, :],
                    mask=live & ranked,
                    other=0.0,
                )
                value = tl.load(
                    x + at * stride_x + columns[None, :], mask=live & inside, other=0.0
                )
                if DROP:
                    kept = _kept(rows, first, multiplier, offset, threshold, K, BM)
                    value = tl.where(kept, value, 0.0)
                acc = tl.dot(
                    tl.trans(g), value, acc, input_precision="ieee" if EXACT else "tf32"
                )
            to = grad + tl.load(table + i * 5) + rank[:, None] * K + columns[None, :]
            mask = tl.trans(ranked) & inside
            tl.store(to, tl.load(to, mask=mask, other=0.0) + acc * keep_scale, mask=mask)
    else:
        # dB [rows, r] = s dyᵀ u, made transposed
        i = which - N
        row0 = tl.load(table + i * 5 + 2)
        count = tl.load(table + i * 5 + 3)
        inside = (columns < count)[None, :]
        if first < count:
            for t in range(0, T, BT):
                rows = t + tl.arange(0, BT)
                live = (rows < T)[:, None]
                at = rows.to(tl.int64)[:, None]
                u = tl.load(
                    x + at * stride_x + K + i * RANK + rank[None, :], mask=live & ranked, other=0.0
                )
                value = tl.load(
                    d_y + at * stride_dy + row0 + columns[None, :], mask=live & inside, other=0.0
                )
                acc = tl.dot(
                    tl.trans(u), value, acc, input_precision="ieee" if EXACT else "tf32"
                )
            to = grad + tl.load(table + i * 5 + 1) + columns[None, :] * RANK + rank[:, None]
            mask = tl.trans(ranked) & inside
            tl.store(to, tl.load(to, mask=mask, other=0.0) + acc * scale, mask=mask)


@triton.jit
def _fold_b(  # type: ignore[no-untyped-def]
    values, table, like, scale, RANK: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr
):
    entry = table + 4 * tl.program_id(1)
    to = tl.load(entry).to(tl.pointer_type(like.dtype.element_ty))
    stride = tl.load(entry + 1)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    rank = tl.arange(0, R)[None, :]
    mask = (rows < tl.load(entry + 2)) & (rank < RANK)
    b = tl.load(values + tl.load(entry + 3) + rows * RANK + rank, mask=mask, other=0.0)
    tl.store(to + rows * stride + rank, (b * scale).to(like.dtype.element_ty), mask=mask)
