"""The Triton kernels of variable-length attention; :mod:`halfbyte.kernels.attention` launches them.

**Tiles.** A program works on one tile, ``BLOCK`` neighbouring tokens of one row. Where rows begin
and end is known to the device alone, so the grid is fixed by the shapes: row r owns the tiles from
⌊start_r / BLOCK⌋ + r up to ⌊start_r₊₁ / BLOCK⌋ + r + 1, which are at least ⌈length_r / BLOCK⌉.
All rows together have ⌊T / BLOCK⌋ + rows tiles, at most two a row without work, and a program
finds its row by counting the rows whose first tile is not beyond its own.

**Masks.** Keys and queries beyond the end of the row are loaded as zeros. Such a key lies after
every query of the row, so the causal mask hides it. Such a query is given the log-sum-exp +∞ in
the backward pass, which makes its probabilities 0.

**Loops.** ``SPLIT_LOOP`` takes the blocks that causality does not touch in a loop of their own
without masks. This saves instructions in long rows; in short rows filling the load pipeline twice
costs more than the masks do.

Scores live in base 2: exp2 is the instruction that GPUs have.
"""

from __future__ import annotations

from halfbyte.kernels.triton_shim import tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tile_of(cu_seqlens, tile, rows, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """First token and length of the row that owns this tile, and the tile's number in it."""
    index = tl.arange(0, ROWS)
    border = tl.load(cu_seqlens + index, mask=index < rows, other=0)
    begun = (index < rows) & (border // BLOCK + index <= tile)
    row = tl.sum(begun.to(tl.int32), 0) - 1
    start = tl.load(cu_seqlens + row)
    stop = tl.load(cu_seqlens + row + 1)
    return start, stop - start, tile - (start // BLOCK + row)


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    base, offsets, tokens, length,
    MASK_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A tile [tokens, D]; zeros beyond the row's end and beyond the head's width."""
    if MASK_TOKENS:
        if HEAD_DIM == D:
            tile = tl.load(base + offsets, mask=(tokens < length)[:, None], other=0.0)
        else:
            inside = (tokens < length)[:, None] & (tl.arange(0, D) < HEAD_DIM)[None, :]
            tile = tl.load(base + offsets, mask=inside, other=0.0)
    else:
        if HEAD_DIM == D:
            tile = tl.load(base + offsets)
        else:
            tile = tl.load(base + offsets, mask=(tl.arange(0, D) < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def _store(base, offsets, tile, tokens, length, HEAD_DIM: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    inside = (tokens < length)[:, None] & (tl.arange(0, D) < HEAD_DIM)[None, :]
    tl.store(base + offsets, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _visible(queries, keys, WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether a query sees a key; the two broadcast against each other."""
    seen = keys <= queries
    if WINDOW > 0:
        seen = seen & (queries - keys < WINDOW)
    return seen


@triton.jit
def _first_key(first_query, STEP: tl.constexpr, WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the loop over blocks of keys begins."""
    first = first_query * 0
    if WINDOW > 0:
        first = tl.maximum(first_query - WINDOW + 1, 0) // STEP * STEP
    return first


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q, keys_base, value_columns, stride, queries, length, first, stop, scale_2, acc, top, total,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Carry the running softmax over the keys [first, stop) of the row."""
    index = tl.arange(0, STEP)
    offsets = index[:, None] * stride + tl.arange(0, D)[None, :]
    for n in tl.range(first, stop, STEP):
        keys = n + index
        base = keys_base + tl.cast(n, tl.int64) * stride
        k = _load(base, offsets, keys, length, MASKED, HEAD_DIM, D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            seen = _visible(queries[:, None], keys[None, :], WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_2)
        shift = new_top
        if WINDOW > 0:
            # A block that lies wholly before a query's window: -∞ - -∞ has to give no weight.
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores * scale_2 - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(p, 1)
        v = _load(base + value_columns, offsets, keys, length, MASKED, HEAD_DIM, D)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["rows", "tokens"])
def forward_kernel(  # type: ignore[no-untyped-def]
    qkv, cu_seqlens, out, lse, rows, tokens, qkv_stride, out_stride, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    SPLIT_LOOP: tl.constexpr,
):  # fmt: skip
    """out and lse of one tile of queries and one query head. Grid (heads, tiles)."""
    head = tl.program_id(0)
    # The tiles of a row from its end, where the work is, so that short programs come last.
    start, length, block = _tile_of(cu_seqlens, tl.program_id(1), rows, ROWS, BLOCK)
    block = (length + BLOCK - 1) // BLOCK - 1 - block
    if block >= 0:
        first_query = block * BLOCK
        index = tl.arange(0, BLOCK)
        queries = first_query + index
        columns = tl.arange(0, D)[None, :]
        row_base = qkv + start.to(tl.int64) * qkv_stride
        query_base = row_base + first_query.to(tl.int64) * qkv_stride + head * HEAD_DIM
        q = _load(
            query_base, index[:, None] * qkv_stride + columns, queries, length, True, HEAD_DIM, D
        )
        keys_base = row_base + (HEADS + head // (HEADS // KV_HEADS)) * HEAD_DIM
        acc = tl.zeros((BLOCK, D), tl.float32)
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        scale_2 = scale * LOG2_E
        first = _first_key(first_query, STEP, WINDOW)
        stop = tl.minimum(first_query + BLOCK, length)
        if SPLIT_LOOP:
            # All of these keys come before the tile, so they are seen and lie inside the row.
            acc, top, total = _attend(
                q, keys_base, KV_HEADS * HEAD_DIM, qkv_stride, queries, length, first, first_query,
                scale_2, acc, top, total, False, WINDOW, STEP, HEAD_DIM, D,
            )  # fmt: skip
            first = first_query
        acc, top, total = _attend(
            q, keys_base, KV_HEADS * HEAD_DIM, qkv_stride, queries, length, first, stop,
            scale_2, acc, top, total, True, WINDOW, STEP, HEAD_DIM, D,
        )  # fmt: skip
        token = start.to(tl.int64) + first_query
        _store(
            out + token * out_stride + head * HEAD_DIM,
            index[:, None] * out_stride + columns,
            acc / total[:, None], queries, length, HEAD_DIM, D,
        )  # fmt: skip
        lse_base = lse + head.to(tl.int64) * tokens + token
        tl.store(lse_base + index, (top + tl.log2(total)) * LN_2, mask=queries < length)


@triton.jit(do_not_specialize=["tokens"])
def delta_kernel(  # type: ignore[no-untyped-def]
    d_out, out, delta, tokens, d_out_stride, out_stride,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta = Σ out · d_out of each token and head. Grid (⌈T / BLOCK⌉, heads)."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    columns = tl.arange(0, D)[None, :]
    inside = (token < tokens)[:, None] & (columns < HEAD_DIM)
    far = token.to(tl.int64)[:, None]
    o = tl.load(out + far * out_stride + head * HEAD_DIM + columns, mask=inside, other=0.0)
    d = tl.load(d_out + far * d_out_stride + head * HEAD_DIM + columns, mask=inside, other=0.0)
    sums = tl.sum(o.to(tl.float32) * d.to(tl.float32), 1)
    tl.store(delta + head.to(tl.int64) * tokens + token, sums, mask=token < tokens)


@triton.jit
def _gather_keys(  # type: ignore[no-untyped-def]
    k, v, dk, dv, queries_base, d_out_base, lse, delta, tokens, stride, d_out_stride, keys, length,
    first, blocks, scale_2, MASKED: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr,
    HEADS_HERE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv what ``blocks`` blocks of queries from ``first`` on give, head after head.

    One loop over heads and blocks, so that loads run ahead from one head into the next.
    """
    index = tl.arange(0, STEP)
    columns = tl.arange(0, D)[None, :]
    offsets = index[:, None] * stride + columns
    d_out_offsets = index[:, None] * d_out_stride + columns
    divisor = tl.maximum(blocks, 1)
    for turn in tl.range(0, blocks * HEADS_HERE):
        head = turn // divisor
        m = first + (turn - head * divisor) * STEP
        queries = m + index
        far = m.to(tl.int64)
        base = queries_base + far * stride + head * HEAD_DIM
        q = _load(base, offsets, queries, length, True, HEAD_DIM, D)
        statistic = head.to(tl.int64) * tokens + far + index
        log_sums = tl.load(lse + statistic, mask=queries < length, other=float("inf")) * LOG2_E
        p_t = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_2 - log_sums[None, :])
        if MASKED:
            p_t = tl.where(_visible(queries[None, :], keys[:, None], WINDOW), p_t, 0.0)
        base = d_out_base + far * d_out_stride + head * HEAD_DIM
        d_o = _load(base, d_out_offsets, queries, length, True, HEAD_DIM, D)
        dv = tl.dot(p_t.to(d_o.dtype), d_o, dv, input_precision="ieee")
        dp_t = tl.dot(v, tl.trans(d_o), input_precision="ieee")
        d = tl.load(delta + statistic, mask=queries < length, other=0.0)
        ds_t = p_t * (dp_t - d[None, :])
        dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _gather_queries(  # type: ignore[no-untyped-def]
    q, d_o, dq, log_sums, d, keys_base, value_columns, stride, queries, length, first, stop,
    scale_2, MASKED: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Add to dq what the keys [first, stop) of the row give."""
    index = tl.arange(0, STEP)
    offsets = index[:, None] * stride + tl.arange(0, D)[None, :]
    for n in tl.range(first, stop, STEP):
        keys = n + index
        base = keys_base + tl.cast(n, tl.int64) * stride
        k = _load(base, offsets, keys, length, MASKED, HEAD_DIM, D)
        v = _load(base + value_columns, offsets, keys, length, MASKED, HEAD_DIM, D)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_2 - log_sums[:, None])
        if MASKED:
            p = tl.where(_visible(queries[:, None], keys[None, :], WINDOW), p, 0.0)
        dp = tl.dot(d_o, tl.trans(v), input_precision="ieee")
        ds = p * (dp - d[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["rows", "tokens", "tiles"])
def backward_kernel(  # type: ignore[no-untyped-def]
    d_out, qkv, lse, delta, cu_seqlens, d_qkv, parts, rows, tokens, tiles,
    d_out_stride, qkv_stride, d_qkv_stride, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    SPLIT_LOOP: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """dk and dv of tiles of keys, then dq of tiles of queries, in one grid.

    The first tiles · KV_HEADS · SPLITS programs make dk and dv, each for a tile and 1 / SPLITS of a
    key head's query heads; the next tiles · HEADS make dq. Together they fill a GPU that neither
    would fill, and the short programs of the second kind even out the long ones of the first.
    ``parts`` is fp32 [SPLITS, T, 2 · KV_HEADS · HEAD_DIM], not used where SPLITS is 1.
    """
    HEADS_HERE: tl.constexpr = HEADS // KV_HEADS // SPLITS
    index = tl.arange(0, BLOCK)
    columns = tl.arange(0, D)[None, :]
    offsets = index[:, None] * qkv_stride + columns
    scale_2 = scale * LOG2_E
    program = tl.program_id(0)
    of_keys = tiles * (KV_HEADS * SPLITS)
    if program < of_keys:
        tile = program // (KV_HEADS * SPLITS)
        part = program % SPLITS
        kv_head = program // SPLITS % KV_HEADS
        start, length, block = _tile_of(cu_seqlens, tile, rows, ROWS, BLOCK)
        first_key = block * BLOCK
        if first_key < length:
            keys = first_key + index
            head = kv_head * (HEADS // KV_HEADS) + part * HEADS_HERE
            far_start = start.to(tl.int64)
            row_base = qkv + far_start * qkv_stride
            key_columns = (HEADS + kv_head) * HEAD_DIM
            key_base = row_base + first_key.to(tl.int64) * qkv_stride + key_columns
            k = _load(key_base, offsets, keys, length, True, HEAD_DIM, D)
            v = _load(key_base + KV_HEADS * HEAD_DIM, offsets, keys, length, True, HEAD_DIM, D)
            dk = tl.zeros((BLOCK, D), tl.float32)
            dv = tl.zeros((BLOCK, D), tl.float32)
            queries_base = row_base + head * HEAD_DIM
            d_out_base = d_out + far_start * d_out_stride + head * HEAD_DIM
            statistic = head.to(tl.int64) * tokens + far_start
            first = first_key // STEP * STEP
            stop = length
            if WINDOW > 0:
                stop = tl.minimum(length, first_key + (BLOCK + WINDOW - 1))
            blocks = (stop - first + STEP - 1) // STEP
            if SPLIT_LOOP:
                # Queries past the tile see all of its keys that lie in the row.
                masked = (tl.minimum(first_key + BLOCK, stop) - first + STEP - 1) // STEP
                dk, dv = _gather_keys(
                    k, v, dk, dv, queries_base, d_out_base, lse + statistic, delta + statistic,
                    tokens, qkv_stride, d_out_stride, keys, length, first + masked * STEP,
                    blocks - masked, scale_2, False, WINDOW, STEP, HEADS_HERE, HEAD_DIM, D,
                )  # fmt: skip
                blocks = masked
            dk, dv = _gather_keys(
                k, v, dk, dv, queries_base, d_out_base, lse + statistic, delta + statistic,
                tokens, qkv_stride, d_out_stride, keys, length, first,
                blocks, scale_2, True, WINDOW, STEP, HEADS_HERE, HEAD_DIM, D,
            )  # fmt: skip
            token = far_start + first_key
            if SPLITS == 1:
                base = d_qkv + token * d_qkv_stride + key_columns
                stores = index[:, None] * d_qkv_stride + columns
            else:
                WIDTH: tl.constexpr = 2 * KV_HEADS * HEAD_DIM
                base = parts + (part.to(tl.int64) * tokens + token) * WIDTH + kv_head * HEAD_DIM
                stores = index[:, None] * WIDTH + columns
            _store(base, stores, dk * scale, keys, length, HEAD_DIM, D)
            _store(base + KV_HEADS * HEAD_DIM, stores, dv, keys, length, HEAD_DIM, D)
    else:
        tile = (program - of_keys) // HEADS
        head = (program - of_keys) % HEADS
        start, length, block = _tile_of(cu_seqlens, tile, rows, ROWS, BLOCK)
        block = (length + BLOCK - 1) // BLOCK - 1 - block
        if block >= 0:
            first_query = block * BLOCK
            queries = first_query + index
            row_base = qkv + start.to(tl.int64) * qkv_stride
            token = start.to(tl.int64) + first_query
            q = _load(
                qkv + token * qkv_stride + head * HEAD_DIM,
                offsets, queries, length, True, HEAD_DIM, D,
            )  # fmt: skip
            d_o = _load(
                d_out + token * d_out_stride + head * HEAD_DIM,
                index[:, None] * d_out_stride + columns, queries, length, True, HEAD_DIM, D,
            )  # fmt: skip
            statistic = head.to(tl.int64) * tokens + token + index
            log_sums = tl.load(lse + statistic, mask=queries < length, other=float("inf")) * LOG2_E
            d = tl.load(delta + statistic, mask=queries < length, other=0.0)
            dq = tl.zeros((BLOCK, D), tl.float32)
            keys_base = row_base + (HEADS + head // (HEADS // KV_HEADS)) * HEAD_DIM
            first = _first_key(first_query, STEP, WINDOW)
            stop = tl.minimum(first_query + BLOCK, length)
            if SPLIT_LOOP:
                dq = _gather_queries(
                    q, d_o, dq, log_sums, d, keys_base, KV_HEADS * HEAD_DIM, qkv_stride, queries,
                    length, first, first_query, scale_2, False, WINDOW, STEP, HEAD_DIM, D,
                )  # fmt: skip
                first = first_query
            dq = _gather_queries(
                q, d_o, dq, log_sums, d, keys_base, KV_HEADS * HEAD_DIM, qkv_stride, queries,
                length, first, stop, scale_2, True, WINDOW, STEP, HEAD_DIM, D,
            )  # fmt: skip
            _store(
                d_qkv + token * d_qkv_stride + head * HEAD_DIM,
                index[:, None] * d_qkv_stride + columns,
                dq * scale, queries, length, HEAD_DIM, D,
            )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def sum_parts_kernel(  # type: ignore[no-untyped-def]
    parts, d_keys, tokens, d_qkv_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """dk and dv of one token: its ``parts`` added in order. Grid (T,)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLITS):
        place = parts + (part * tokens + token) * WIDTH + column
        total += tl.load(place, mask=column < WIDTH, other=0.0)
    place = d_keys + token * d_qkv_stride + column
    tl.store(place, total.to(d_keys.dtype.element_ty), mask=column < WIDTH)
