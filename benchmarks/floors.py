"""What bounds a training step: its operations, bytes and launches, part by part. Needs no GPU.

    python benchmarks/floors.py [--tokens 768] [--rows 4] [--labels N]

Counts a step of the TinyLlama recipe as halfbyte makes it, once with the dequantized weights kept
and nothing recomputed ("free") and once with NF4 dequantized on the fly and every layer made again
in the backward pass ("tight"), and divides by the rates of some cards. A launch takes at least as
long as its operations at the card's rate of products, and as its bytes at the rate of its memory;
the floor of a part is the sum of the longer of the two over its launches.

Bytes are those of tensors that a launch has to read and write, each once, as if nothing were left
in the L2 cache by the launch before. Operations are those of products (2 for a multiplication and
a sum) with fp32 accumulation; the few others that an element-wise kernel makes are not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

FORWARD = "base products, forward"
BACKWARD = "base products, backward"
THIN = "adapters' thin products"
ATTENTION = "attention"
NORMS = "norms and residual sums"
GATED = "gated activation"
ROTARY = "rotary embedding"
HEAD = "head and loss"
WEIGHTS = "weights out of NF4"
OPTIMIZER = "clipping and optimizer"
INPUT = "embedding, mask keys, zeroing"
PARTS = (
    FORWARD,
    BACKWARD,
    THIN,
    ATTENTION,
    NORMS,
    GATED,
    ROTARY,
    HEAD,
    WEIGHTS,
    OPTIMIZER,
    INPUT,
)

C = 2  # bytes of an element of the products' type, bf16 or fp16
STREAM = 4  # and of the residual stream: the recipe keeps what is not quantized in fp32
FLOAT = 4


@dataclass(frozen=True)
class Card:
    """``tflops`` of dense 16-bit products with fp32 accumulation, ``gb_per_s`` of its memory."""

    name: str
    tflops: float
    gb_per_s: float


# The makers' figures: dense, at the boost clock. GeForce cards halve the rate of 16-bit products
# where they accumulate in fp32, as PyTorch's do: an RTX 3060 has 51 TFLOP/s without that.
CARDS = (
    Card("T4", 65, 320),
    Card("RTX 3060 12 GB", 25.5, 360),
    Card("RTX 4090", 165, 1008),
    Card("A100 80GB", 312, 2039),
    Card("H100 SXM", 989, 3352),
)
# What the H100 of benchmarks/results reached: products of 8,192 rows and more, a copy of 1 GiB.
MEASURED_H100 = Card("H100 SXM, as measured", 815, 3000)


@dataclass(frozen=True)
class Shape:
    """A decoder and its adapters; TinyLlama 1.1B under the recipe's settings."""

    hidden: int = 2048
    intermediate: int = 5632
    layers: int = 22
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 64
    vocabulary: int = 32000
    rank: int = 16  # on q, k, v and o

    @property
    def attended(self) -> int:
        """Columns of attention's output."""
        return self.heads * self.head_dim

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def products(self) -> tuple[tuple[int, int, int], ...]:
        """(columns, rows, adapters) of each joined weight of a layer, in the order of the layer."""
        return (
            (self.hidden, self.qkv, 3),
            (self.attended, self.hidden, 1),
            (self.hidden, 2 * self.intermediate, 0),
            (self.intermediate, self.hidden, 0),
        )

    @property
    def linear(self) -> int:
        """Weights of all linear layers of the decoder."""
        return self.layers * sum(columns * rows for columns, rows, _ in self.products)

    @property
    def trained(self) -> int:
        """Elements of all A and B."""
        each = sum(n * columns + rows for columns, rows, n in self.products if n)
        return self.layers * self.rank * each


TINYLLAMA = Shape()


@dataclass(frozen=True)
class Work:
    """The same thing done ``times`` over in a step: one's operations, bytes moved and kernels."""

    part: str
    times: int
    operations: int
    moved: int
    kernels: int = 1


def step_work(
    shape: Shape, rows: Sequence[int], *, labels: int, recomputed: int = 0, from_nf4: int = 0
) -> list[Work]:
    """A step of one micro-batch with ``rows`` tokens in each row, ``labels`` of them learned.

    ``recomputed`` layers are made again in the backward pass; of ``from_nf4`` layers the weights
    are dequantized where they are wanted, of the others a copy is kept.
    """
    tokens = sum(rows)
    work = [
        *_products(shape, tokens, recomputed),
        *_thin(shape, tokens, recomputed),
        *_attention(shape, rows, recomputed),
        *_passes(shape, tokens, recomputed),
        *_head(shape, tokens, labels),
        *_update(shape, from_nf4),
        *_dequantize(shape, from_nf4),
    ]
    return [one for one in work if one.times > 0]


def both_ways(shape: Shape, rows: Sequence[int], labels: int) -> tuple[list[Work], list[Work]]:
    """Nothing recomputed with all weights kept, and the other way round."""
    every = shape.layers
    return (
        step_work(shape, rows, labels=labels),
        step_work(shape, rows, labels=labels, recomputed=every, from_nf4=every),
    )


def floor_ms(work: Iterable[Work], card: Card) -> float:
    """The shortest that ``work`` can take on ``card``."""
    seconds = 0.0
    for one in work:
        by_operations = one.operations / (card.tflops * 1e12)
        by_bytes = one.moved / (card.gb_per_s * 1e9)
        seconds += one.times * max(by_operations, by_bytes)
    return seconds * 1e3


def of_part(work: Iterable[Work], *parts: str) -> list[Work]:
    return [one for one in work if one.part in parts]


def operations(work: Iterable[Work]) -> int:
    return sum(one.times * one.operations for one in work)


def moved(work: Iterable[Work]) -> int:
    return sum(one.times * one.moved for one in work)


def kernels(work: Iterable[Work]) -> int:
    return sum(one.times * one.kernels for one in work)


def _products(shape: Shape, tokens: int, recomputed: int) -> list[Work]:
    """Two products with each joined weight, a third where the layer is made again.

    B is folded into the weight as rank · adapters further columns; the products have it for the
    forward pass and g = dy · B for the backward pass. What the fold pads to is not counted.
    """
    found = []
    for at, (columns, rows, adapters) in enumerate(shape.products):
        width = columns + adapters * shape.rank
        flops = 2 * tokens * width * rows
        size = C * (tokens * (width + rows) + width * rows)
        found.append(Work(FORWARD, shape.layers, flops, size))
        found.append(Work(BACKWARD, shape.layers, flops, size))
        if at < len(shape.products) - 1:  # nothing needs the last one's output again
            found.append(Work(BACKWARD, recomputed, flops, size))
    return found


def _thin(shape: Shape, tokens: int, recomputed: int) -> list[Work]:
    """u = drop(x) Aᵀ; dx += mask ⊙ (g A); dA = gᵀ drop(x) and dB = dyᵀ u, by joined weight."""
    found = []
    for columns, rows, adapters in shape.products:
        if not adapters:
            continue
        r = adapters * shape.rank
        down = 2 * tokens * columns * r
        x, u, a = tokens * columns, tokens * r, columns * r
        times = shape.layers + recomputed
        found.append(Work(THIN, times, down, C * (x + u + a), kernels=2))
        found.append(Work(THIN, shape.layers, down, C * (2 * x + u + a)))
        grads = down + 2 * tokens * rows * shape.rank  # each row of dy meets its own adapter's u
        size = C * (x + tokens * rows + 2 * u) + 2 * FLOAT * (a + rows * shape.rank)
        found.append(Work(THIN, shape.layers, grads, size, kernels=2))
    return found


def _attention(shape: Shape, rows: Sequence[int], recomputed: int) -> list[Work]:
    """Scores that causality leaves; five products backward for the two forward."""
    tokens = sum(rows)
    scores = sum(n * (n + 1) // 2 for n in rows) * shape.heads
    product = 2 * scores * shape.head_dim
    qkv, out = tokens * shape.qkv, tokens * shape.attended
    log_sums = FLOAT * tokens * shape.heads
    return [
        Work(ATTENTION, shape.layers + recomputed, 2 * product, C * (qkv + out) + log_sums),
        Work(ATTENTION, shape.layers, 5 * product, C * 2 * (qkv + out) + log_sums, kernels=3),
    ]


def _passes(shape: Shape, tokens: int, recomputed: int) -> list[Work]:
    """What is bound by memory alone."""
    h, i = tokens * shape.hidden, tokens * shape.intermediate
    turned = 2 * C * tokens * (shape.heads + shape.kv_heads) * shape.head_dim
    norms = 2 * shape.layers
    backward = h * (C + STREAM + 2 * STREAM + C)
    return [
        Work(NORMS, 1, 0, h * (STREAM + C)),
        Work(NORMS, norms + recomputed, 0, h * (2 * STREAM + 2 * C)),
        Work(NORMS, recomputed, 0, h * (STREAM + C)),  # a layer's first: its sum was kept
        Work(NORMS, norms, 0, backward),
        Work(NORMS, 1, 0, h * (C + STREAM + STREAM + C)),
        Work(GATED, shape.layers, 0, C * 3 * i),
        Work(GATED, shape.layers, 0, C * 5 * i),
        Work(ROTARY, 2 * shape.layers + recomputed, 0, turned),
        Work(INPUT, 1, 0, h * (C + STREAM), kernels=5),
    ]


def _head(shape: Shape, tokens: int, labels: int) -> list[Work]:
    flops = 2 * labels * shape.hidden * shape.vocabulary
    logits, weight, hidden = (
        labels * shape.vocabulary,
        shape.hidden * shape.vocabulary,
        labels * shape.hidden,
    )
    return [
        Work(HEAD, 2, flops, C * (logits + weight + hidden)),
        Work(HEAD, 1, 0, C * 2 * logits, kernels=2),
    ]


def _dequantize(shape: Shape, layers: int) -> list[Work]:
    """Each weight for the forward and for the backward pass, but those of the last layer once.

    Half a byte and the 8-bit scale of a block of 64 come in.
    """
    return [
        Work(WEIGHTS, 2 * layers - 1, 0, n // 2 + n // 64 + C * n)
        for n in (columns * rows for columns, rows, _ in shape.products)
    ]


def _update(shape: Shape, from_nf4: int) -> list[Work]:
    """Gradients zeroed, their norm; p, m, v and g; p rounded; s B written into the weights."""
    n = shape.trained
    adapted = [rows for _, rows, adapters in shape.products if adapters]
    fold = shape.rank * (FLOAT + C)  # bytes of a row
    kept = shape.layers - from_nf4  # all of these in one launch
    return [
        Work(INPUT, 1, 0, n * FLOAT),
        Work(OPTIMIZER, 1, 0, n * FLOAT, kernels=4),
        Work(OPTIMIZER, 1, 0, n * (3 * FLOAT + 4), kernels=2),
        Work(OPTIMIZER, 1, 0, n * (FLOAT + C)),
        Work(WEIGHTS, min(1, kept), 0, fold * kept * sum(adapted)),
        *(Work(WEIGHTS, 2 * from_nf4 - 1, 0, fold * rows) for rows in adapted),
    ]


def parts_table(shape: Shape, rows: Sequence[int], labels: int) -> str:
    """Operations, bytes and launches of each part, both ways of making a step."""
    lines = [
        "| part | GFLOP | MB | launches | floor, ms | recomputed, from NF4: GFLOP | MB "
        "| launches | floor, ms |",
        "| --- |" + " ---: |" * 8,
    ]
    ways = both_ways(shape, rows, labels)
    for part in [*PARTS, "all"]:
        cells = [part]
        for work in ways:
            own = list(work) if part == "all" else of_part(work, part)
            cells += [
                f"{operations(own) / 1e9:,.1f}",
                f"{moved(own) / 1e6:,.1f}",
                f"{kernels(own):,}",
                f"{floor_ms(own, MEASURED_H100):.3f}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cards_table(shape: Shape, rows: Sequence[int], labels: int) -> str:
    """Floors of a step on each card."""
    lines = [
        "| card | TFLOP/s | GB/s | floor of a step, ms | of that products | "
        "recomputed, from NF4: floor, ms |",
        "| --- |" + " ---: |" * 5,
    ]
    free, tight = both_ways(shape, rows, labels)
    for card in (*CARDS, MEASURED_H100):
        products = floor_ms(of_part(free, FORWARD, BACKWARD, HEAD), card)
        lines.append(
            f"| {card.name} | {card.tflops:g} | {card.gb_per_s:,.0f} | {floor_ms(free, card):.1f} "
            f"| {products:.1f} | {floor_ms(tight, card):.1f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=768, help="of a step, padding included")
    parser.add_argument("--rows", type=int, default=4, help="equally long rows of a step")
    parser.add_argument("--labels", type=int, help="learned tokens; by default all")
    args = parser.parse_args(argv)
    rows = even_rows(args.tokens, args.rows)
    labels = args.tokens if args.labels is None else args.labels
    print(parts_table(TINYLLAMA, rows, labels))
    print()
    print(cards_table(TINYLLAMA, rows, labels))


def even_rows(tokens: int, rows: int) -> list[int]:
    """``tokens`` in so many rows as equal as can be."""
    return [tokens // rows + (at < tokens % rows) for at in range(rows)]


if __name__ == "__main__":
    main()
