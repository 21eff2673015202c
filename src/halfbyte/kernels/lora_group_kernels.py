"""The Triton kernels of :mod:`halfbyte.kernels.lora_group`, which launches and explains them."""

from __future__ import annotations

from halfbyte.kernels.dropout import kept_tile
from halfbyte.kernels.triton_shim import tl, triton


@triton.jit(do_not_specialize=["T"])
def lora_down_kernel(  # type: ignore[no-untyped-def]
    x,
    parts,
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
    SPLITS: tl.constexpr,
    STEPS: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    PAD: tl.constexpr,
    EXACT: tl.constexpr,
):
    i = tl.program_id(1) % N
    split = tl.program_id(1) // N
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    live = (rows < T)[:, None]
    at = x + rows.to(tl.int64)[:, None] * stride
    rank = tl.arange(0, R)
    a = shadow + tl.load(table + i * 5)
    acc = tl.zeros((BT, R), tl.float32)
    multiplier = tl.full((), 0, tl.uint32)
    offset = tl.full((), 0, tl.uint32)
    if DROP:
        key = keys + 2 * tl.load(table + i * 5 + 4)
        multiplier = tl.load(key).to(tl.uint32, bitcast=True)
        offset = tl.load(key + 1).to(tl.uint32, bitcast=True)
    for step in range(STEPS):
        first = (split * STEPS + step) * BK
        columns = first + tl.arange(0, BK)
        inside = (columns < K)[None, :]
        value = tl.load(at + columns[None, :], mask=live & inside, other=0.0)
        if DROP:
            kept = kept_tile(rows, first, multiplier, offset, threshold, K, BK)
            value = tl.where(kept, value, 0.0)
        weight = tl.load(
            a + rank[None, :] * K + columns[:, None],
            mask=(columns < K)[:, None] & (rank < RANK)[None, :],
            other=0.0,
        )
        acc = tl.dot(value, weight, acc, input_precision="ieee" if EXACT else "tf32")
    mask = live & (rank < RANK)[None, :]
    if SPLITS == 1:
        out = (acc * keep_scale).to(x.dtype.element_ty)
        tl.store(at + K + i * RANK + rank[None, :], out, mask=mask)
        if EXTRA > N * RANK and i == 0:
            pad = N * RANK + tl.arange(0, PAD)[None, :]
            zero = tl.zeros((BT, PAD), x.dtype.element_ty)
            tl.store(at + K + pad, zero, mask=live & (pad < EXTRA))
    else:
        to = parts + (split * T + rows).to(tl.int64)[:, None] * (N * RANK) + i * RANK
        tl.store(to + rank[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["T"])
def sum_down_kernel(  # type: ignore[no-untyped-def]
    parts,
    x,
    T,
    stride,
    keep_scale,
    K: tl.constexpr,
    EXTRA: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * 8 + tl.arange(0, 8)
    column = tl.arange(0, BLOCK)[None, :]
    live = (rows < T)[:, None]
    total = tl.zeros((8, BLOCK), tl.float32)
    for split in tl.static_range(SPLITS):
        at = parts + (split * T + rows).to(tl.int64)[:, None] * WIDTH + column
        total += tl.load(at, mask=live & (column < WIDTH), other=0.0)
    to = x + rows.to(tl.int64)[:, None] * stride + K + column
    tl.store(to, (total * keep_scale).to(x.dtype.element_ty), mask=live & (column < EXTRA))


@triton.jit(do_not_specialize=["T"])
def lora_grad_input_kernel(  # type: ignore[no-untyped-def]
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
            kept = kept_tile(rows, first, multiplier, offset, threshold, K, BK)
            part = tl.where(kept, part, 0.0)
        total += part
    mask = live & inside
    old = tl.load(at + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    new = (old + total * keep_scale).to(d_x.dtype.element_ty)
    tl.store(at + columns[None, :], new, mask=mask)


@triton.jit(do_not_specialize=["T", "span"])
def lora_grads_kernel(  # type: ignore[no-untyped-def]
    x,
    d_x,
    d_y,
    grad,
    parts,
    table,
    keys,
    T,
    span,
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
    SPLIT: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    R: tl.constexpr,
    EXACT: tl.constexpr,
):
    which = tl.program_id(1)
    i = which % N
    first = tl.program_id(0) * BM
    begin = tl.program_id(2) * span
    end = tl.minimum(begin + span, T)
    columns = first + tl.arange(0, BM)
    rank = tl.arange(0, R)
    ranked = (rank < RANK)[None, :]
    acc = tl.zeros((R, BM), tl.float32)
    count = _count(table, which, i, K, N)
    if first < count:
        inside = (columns < count)[None, :]
        if which < N:
            # dA [r, K] = gᵀ drop(x)
            multiplier = tl.full((), 0, tl.uint32)
            offset = tl.full((), 0, tl.uint32)
            if DROP:
                key = keys + 2 * tl.load(table + i * 5 + 4)
                multiplier = tl.load(key).to(tl.uint32, bitcast=True)
                offset = tl.load(key + 1).to(tl.uint32, bitcast=True)
            for t in range(begin, end, BT):
                rows = t + tl.arange(0, BT)
                live = (rows < end)[:, None]
                at = rows.to(tl.int64)[:, None]
                g = tl.load(
                    d_x + at * stride_dx + K + i * RANK + rank[None, :],
                    mask=live & ranked,
                    other=0.0,
                )
                value = tl.load(x + at * stride_x + columns[None, :], mask=live & inside, other=0.0)
                if DROP:
                    kept = kept_tile(rows, first, multiplier, offset, threshold, K, BM)
                    value = tl.where(kept, value, 0.0)
                acc = tl.dot(tl.trans(g), value, acc, input_precision="ieee" if EXACT else "tf32")
        else:
            # dB [rows, r] = s dyᵀ u, made transposed
            row0 = tl.load(table + i * 5 + 2)
            for t in range(begin, end, BT):
                rows = t + tl.arange(0, BT)
                live = (rows < end)[:, None]
                at = rows.to(tl.int64)[:, None]
                u = tl.load(
                    x + at * stride_x + K + i * RANK + rank[None, :], mask=live & ranked, other=0.0
                )
                value = tl.load(
                    d_y + at * stride_dy + row0 + columns[None, :], mask=live & inside, other=0.0
                )
                acc = tl.dot(tl.trans(u), value, acc, input_precision="ieee" if EXACT else "tf32")
        if SPLIT:
            tile = tl.program_id(2) * (2 * N) + which
            tile = (tile * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (R * BM)
            tl.store(parts + tile + _tile(R, BM), acc)
        else:
            _add_grads(grad, table, which, i, columns, count, acc, keep_scale, scale, K, N, RANK, R)


@triton.jit
def sum_grads_kernel(  # type: ignore[no-untyped-def]
    parts,
    grad,
    table,
    keep_scale,
    scale,
    K: tl.constexpr,
    N: tl.constexpr,
    RANK: tl.constexpr,
    BM: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
):
    which = tl.program_id(1)
    i = which % N
    first = tl.program_id(0) * BM
    count = _count(table, which, i, K, N)
    if first < count:
        acc = tl.zeros((R, BM), tl.float32)
        for split in tl.static_range(SPLITS):
            tile = split * (2 * N) + which
            tile = (tile * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (R * BM)
            acc += tl.load(parts + tile + _tile(R, BM))
        columns = first + tl.arange(0, BM)
        _add_grads(grad, table, which, i, columns, count, acc, keep_scale, scale, K, N, RANK, R)


@triton.jit
def _tile(R: tl.constexpr, BM: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.arange(0, R)[:, None] * BM + tl.arange(0, BM)[None, :]


@triton.jit
def _count(table, which, i, K: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns of A, or rows of B."""
    return tl.where(which < N, K, tl.load(table + i * 5 + 3))


@triton.jit
def _add_grads(  # type: ignore[no-untyped-def]
    grad,
    table,
    which,
    i,
    columns,
    count,
    acc,
    keep_scale,
    scale,
    K: tl.constexpr,
    N: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
):
    rank = tl.arange(0, R)[:, None]
    mask = (rank < RANK) & (columns < count)[None, :]
    if which < N:
        to = grad + tl.load(table + i * 5) + rank * K + columns[None, :]
        tl.store(to, tl.load(to, mask=mask, other=0.0) + acc * keep_scale, mask=mask)
    else:
        to = grad + tl.load(table + i * 5 + 1) + columns[None, :] * RANK + rank
        tl.store(to, tl.load(to, mask=mask, other=0.0) + acc * scale, mask=mask)


@triton.jit
def fold_b_kernel(  # type: ignore[no-untyped-def]
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
