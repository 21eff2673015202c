"""Variable-length causal attention on a GPU, forward and backward, beside PyTorch's own.

    python benchmarks/kernels_attention.py [--cases NAME …] [--sweep] [--write]

Each figure is the median of replays of a CUDA graph of 20 launches, in bf16, over the same tensors
(in a training step q, k and v come out of L2 as well). TFLOP/s count the scores under the causal
mask and no more: 4 · D a score and head forward, 2.5 times that backward. Beside them stand
torch's ``varlen_attn`` (flash attention; its backward pass through autograd, with atomics, so not
deterministic) and the memory-efficient kernels that serve GPUs without Triton's products.
``--sweep`` times other block sizes instead, best first; ``--write`` writes
results/kernels_attention.json.
"""

from __future__ import annotations

import argparse
import inspect
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from halfbyte.kernels import attention, attention_efficient
from halfbyte.kernels.attention import Tiles
from record import write_results

LAUNCHES, REPLAYS = 20, 7
BACKWARD = 2.5  # products backward for one forward
FORWARD_SWEEP = [
    Tiles(block, step, warps, stages, split)
    for block, step, warps, stages in (
        (64, 32, 4, 3),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (128, 64, 4, 2),
        (128, 64, 4, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
    )
    for split in (False, True)
]
BACKWARD_SWEEP = [
    Tiles(block, step, warps, stages, split)
    for block, step, warps, stages in (
        (32, 32, 4, 2),
        (64, 32, 4, 2),
        (64, 32, 4, 3),
        (64, 64, 4, 2),
        (64, 64, 8, 2),
        (128, 32, 8, 2),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
    )
    for split in (False, True)
]


@dataclass(frozen=True)
class Shape:
    """A batch: the lengths of its rows and the model's heads."""

    lengths: tuple[int, ...]
    max_seqlen: int
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 64

    def flops(self) -> float:
        scores = sum(n * (n + 1) // 2 for n in self.lengths)
        return 4.0 * self.head_dim * self.heads * scores


def packed(tokens: int) -> tuple[int, ...]:
    """Rows of 60 to 512 tokens with a mean of about 190, as chats have, up to ``tokens``."""
    generator = random.Random(0)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        length = round(min(max(generator.lognormvariate(5.1, 0.5), 60), 512))
        lengths.append(min(length, left))
    return tuple(lengths)


SHAPES = {
    "tinyllama-4x192": Shape((192,) * 4, 512),
    "tinyllama-768": Shape((286, 97, 227, 134, 24), 512),
    "tinyllama-768-long-row": Shape((60, 96, 512, 76, 24), 512),
    "packed-16k": Shape(packed(16384), 512),
    "4x2048": Shape((2048,) * 4, 2048),
    "8x2048": Shape((2048,) * 8, 2048),
    "8x2048-d128": Shape((2048,) * 8, 2048, 32, 8, 128),
}

Work = Callable[[], Any]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sweep", action="store_true", help="time other block sizes instead")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    print(torch.cuda.get_device_name())
    if args.sweep:
        for name in args.cases:
            sweep(name, SHAPES[name])
        return
    print(f"{'':26}{'':14}{'forward us':>11}{'TFLOP/s':>9}{'backward us':>13}{'TFLOP/s':>9}")
    rows = []
    for name in args.cases:
        shape = SHAPES[name]
        for tool, make in TOOLS.items():
            try:
                forward, backward = make(shape)
                times = time_graph(forward), time_graph(backward)
            except (RuntimeError, TypeError, ImportError, NotImplementedError) as error:
                print(f"{name:26}{tool:14}  not run: {str(error).splitlines()[0]}")
                continue
            rates = shape.flops() / times[0] / 1e6, BACKWARD * shape.flops() / times[1] / 1e6
            print(
                f"{name:26}{tool:14}{times[0]:11.1f}{rates[0]:9.0f}{times[1]:13.1f}{rates[1]:9.0f}"
            )
            for direction, time, rate in zip(("forward", "backward"), times, rates, strict=True):
                row = {"case": name, "tool": tool}
                rows.append({**row, "metric": direction, "value": time, "unit": "us"})
                rows.append(
                    {**row, "metric": f"{direction} rate", "value": rate, "unit": "TFLOP/s"}
                )
    if args.write:
        write_results("kernels_attention", rows, device=torch.cuda.get_device_name())


def tensors(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """cu_seqlens, qkv and d_out."""
    generator = torch.Generator("cuda").manual_seed(0)
    tokens, heads = sum(shape.lengths), shape.heads + 2 * shape.kv_heads
    cu_seqlens = torch.tensor([0, *shape.lengths]).cumsum(0).to("cuda", torch.int32)
    qkv, d_out = (
        torch.randn(tokens, n * shape.head_dim, device="cuda", generator=generator).bfloat16()
        for n in (heads, shape.heads)
    )
    return cu_seqlens, qkv, d_out


def ours(shape: Shape, module: Any = attention) -> tuple[Work, Work]:
    cu_seqlens, qkv, d_out = tensors(shape)
    out, d_qkv = torch.empty_like(d_out), torch.empty_like(qkv)
    tokens, rows = len(qkv), len(shape.lengths)
    lse = d_out.new_empty(
        module.lse_shape(tokens, rows, shape.max_seqlen, shape.heads), dtype=torch.float32
    )
    delta = d_out.new_empty((shape.heads, tokens), dtype=torch.float32)
    sizes = (shape.max_seqlen, shape.heads, shape.kv_heads, shape.head_dim)
    scale = 1 / math.sqrt(shape.head_dim)

    def forward() -> None:
        module.attention(qkv, cu_seqlens, *sizes, scale, out, lse)

    def backward() -> None:
        module.attention_backward(d_out, qkv, out, lse, cu_seqlens, *sizes, scale, d_qkv, delta)

    return forward, backward


def varlen(shape: Shape) -> tuple[Work, Work]:
    from torch.nn.attention.varlen import varlen_attn

    cu_seqlens, qkv, d_out = tensors(shape)
    heads = qkv.view(len(qkv), -1, shape.head_dim)
    counts = [shape.heads, shape.kv_heads, shape.kv_heads]
    q, k, v = (part.contiguous().requires_grad_() for part in heads.split(counts, 1))
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    longest = shape.max_seqlen

    def forward() -> torch.Tensor:
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        out = forward()
        upstream = d_out.view(out.shape)

    def backward() -> None:
        torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True)

    # Autograd works on the stream of the forward pass, so that is the one to capture on.
    backward.stream = side  # type: ignore[attr-defined]
    return forward, backward


TOOLS: dict[str, Callable[[Shape], tuple[Work, Work]]] = {
    "halfbyte": ours,
    "varlen_attn": varlen,
    "efficient": lambda shape: ours(shape, attention_efficient),
}


def time_graph(work: Work) -> float:
    """Microseconds of one ``work`` within a graph of LAUNCHES of them."""
    stream = getattr(work, "stream", None) or torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(LAUNCHES):
            work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 2)]
    for mark in marks:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in pairwise(marks[1:])]  # milliseconds
    return median(times) * 1e3 / LAUNCHES


@contextmanager
def chosen(name: str, value: Any) -> Iterator[None]:
    before = getattr(attention, name)
    setattr(attention, name, value)
    try:
        yield
    finally:
        setattr(attention, name, before)


def sweep(name: str, shape: Shape) -> None:
    forward, backward = ours(shape)
    forward()  # lse and out for the backward pass
    for direction, work, candidates in (
        ("forward", forward, FORWARD_SWEEP),
        ("backward", backward, BACKWARD_SWEEP),
    ):
        found = [(time_graph(work), "the table's")]
        if direction == "backward":
            for programs in (0, 192, 768):
                with chosen("ENOUGH_PROGRAMS", programs):
                    found.append((time_graph(work), f"the table's, ENOUGH_PROGRAMS {programs}"))
        for tiles in candidates:
            with chosen(f"{direction}_tiles", lambda *_, tiles=tiles: tiles):
                try:
                    found.append((time_graph(work), str(tuple(tiles))))
                except Exception as error:  # not enough shared memory or registers
                    print(f"{name} {direction} {tuple(tiles)}: {str(error).splitlines()[0]}")
        for time, tiles in sorted(found):
            print(f"{name:26}{direction:10}{time:9.1f} us  {tiles}")


if __name__ == "__main__":
    main()
