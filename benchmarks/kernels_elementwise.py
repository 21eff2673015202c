"""The element-wise kernels on a GPU, beside a copy of as many bytes and plain PyTorch.

    python benchmarks/kernels_elementwise.py [--tokens 768 16384] [--bitsandbytes] [--write]

RMSNorm with the residual sum, rotary embedding, SwiGLU and NF4 dequantization in the shapes of a
TinyLlama in bf16. Each is a CUDA graph of 20 launches over buffers that in turn go through more
memory than the L2 cache holds, so bytes come from and go to device memory; in a training step
some of them are still in L2 and the kernels take less. The first line is the ceiling: a copy of
1 GiB. At 768 tokens a launch itself takes as long as the bytes, so the time of PyTorch's simplest
kernel (``neg``) that moves as many bytes stands beside each. ``--bitsandbytes`` also times its
dequantization; ``--write`` writes results/kernels_elementwise.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.gated import (
    gated,
    gated_backward,
    gated_backward_reference,
    gated_reference,
)
from halfbyte.kernels.nf4_dequantize import nf4_dequantize, nf4_dequantize_reference
from halfbyte.kernels.rms_norm import (
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_reference,
    rms_norm_reference,
)
from halfbyte.kernels.rope import rope_, rope_reference_
from halfbyte.quant.nf4 import quantize_nf4
from record import write_results

HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM, QKV = 2048, 5632, 36, 64, 2560
WEIGHTS = ((2560, 2048), (11264, 2048), (2048, 5632))  # q/k/v, gate/up, down
BLOCK_SIZE = 64
C = torch.bfloat16
LAUNCHES = 20  # in a graph
TOUCHED = 256 << 20  # bytes that the buffers of a case add up to: five times an H100's L2

Tensors = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """A kernel and its plain form on the same tensors, and the bytes that they have to move."""

    name: str
    moved: int
    make: Callable[[], Tensors]
    kernel: Callable[..., None]
    plain: Callable[..., None]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[768, 16384])
    parser.add_argument("--bitsandbytes", action="store_true", help="time its dequantization too")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    torch.manual_seed(0)
    ceiling = copy_rate()
    rows = [row("copy of 1 GiB", "pytorch", "rate", ceiling, "GB/s")]
    print(f"{torch.cuda.get_device_name()}, a copy of 1 GiB: {ceiling:,.0f} GB/s")
    print(f"{'':36}{'us':>9}{'GB/s':>8}{'of copy':>9}{'neg us':>9}{'plain us':>10}")
    cases = [c for tokens in args.tokens for c in token_cases(tokens, "cuda")]
    cases += weight_cases("cuda")
    for case in cases:
        ours = time_case(case, case.kernel, LAUNCHES)
        plain = time_case(case, case.plain, 2)
        copy = neg_case(case.moved)
        neg = time_case(copy, copy.kernel, LAUNCHES)
        rate = case.moved / ours / 1e3
        print(
            f"{case.name:36}{ours:9.2f}{rate:8,.0f}{rate / ceiling:9.0%}{neg:9.2f}{plain:10.1f}",
            flush=True,
        )
        rows += [
            row(case.name, "halfbyte", "time", ours, "us"),
            row(case.name, "halfbyte", "rate", rate, "GB/s"),
            row(case.name, "neg of as many bytes", "time", neg, "us"),
            row(case.name, "pytorch", "time", plain, "us"),
        ]
    if args.bitsandbytes:
        for case in bitsandbytes_cases():
            theirs = time_case(case, case.kernel, LAUNCHES)
            rate = case.moved / theirs / 1e3
            print(f"bitsandbytes: {case.name:22}{theirs:9.2f}{rate:8,.0f}{rate / ceiling:9.0%}")
            rows += [
                row(case.name, "bitsandbytes", "time", theirs, "us"),
                row(case.name, "bitsandbytes", "rate", rate, "GB/s"),
            ]
    if args.write:
        write_results("kernels_elementwise", rows, device=torch.cuda.get_device_name())


def row(case: str, tool: str, metric: str, value: float, unit: str) -> dict[str, Any]:
    return {"case": case, "tool": tool, "metric": metric, "value": value, "unit": unit}


def token_cases(tokens: int, device: str) -> Iterator[Case]:
    """What a layer does to its activations besides products and attention."""

    def new(width: int, dtype: torch.dtype = C) -> Tensor:
        return torch.randn(tokens, width, device=device).to(dtype)

    weight = torch.ones(HIDDEN, dtype=C, device=device)
    angle = torch.rand(2048, HEAD_DIM // 2, device=device)
    cos, sin = angle.cos(), angle.sin()
    ids = (torch.arange(tokens, device=device) % 192).int()
    wide = torch.float32

    def norm(function: Callable[..., None]) -> Callable[..., None]:
        return lambda x, y, out, rstd: function(x, y, weight, 1e-5, x, out, rstd)

    yield Case(
        f"rms_norm, {tokens} tokens",
        tokens * HIDDEN * (4 + 2 + 4 + 2),
        lambda: (new(HIDDEN, wide), new(HIDDEN), new(HIDDEN), new(1, wide)[:, 0]),
        norm(rms_norm),
        norm(rms_norm_reference),
    )

    def norm_backward(function: Callable[..., None]) -> Callable[..., None]:
        return lambda d, s, rstd, ds, ds_c: function(d, s, rstd, weight, ds, ds_c)

    yield Case(
        f"rms_norm_backward, {tokens} tokens",
        tokens * HIDDEN * (2 + 4 + 4 + 4 + 2),
        lambda: (
            new(HIDDEN),
            new(HIDDEN, wide),
            new(1, wide)[:, 0],
            new(HIDDEN, wide),
            new(HIDDEN),
        ),
        norm_backward(rms_norm_backward),
        norm_backward(rms_norm_backward_reference),
    )

    def rotate(function: Callable[..., None]) -> Callable[..., None]:
        return lambda qkv: function(qkv, cos, sin, ids, HEADS, HEAD_DIM)

    yield Case(
        f"rope, {tokens} tokens",
        tokens * HEADS * HEAD_DIM * (2 + 2),
        lambda: (new(QKV),),
        rotate(rope_),
        rotate(rope_reference_),
    )
    yield Case(
        f"gated, {tokens} tokens",
        tokens * INTERMEDIATE * (4 + 2),
        lambda: (new(2 * INTERMEDIATE), new(INTERMEDIATE)),
        lambda gate_up, out: gated(gate_up, out, "silu"),
        lambda gate_up, out: gated_reference(gate_up, out, "silu"),
    )
    # Not in place, where each replay would make the next one's numbers larger.
    yield Case(
        f"gated_backward, {tokens} tokens",
        tokens * INTERMEDIATE * (2 + 4 + 4 + 2),
        lambda: (
            new(INTERMEDIATE),
            new(2 * INTERMEDIATE),
            new(2 * INTERMEDIATE),
            new(INTERMEDIATE),
        ),
        lambda d, gate_up, d_gate_up, act: gated_backward(d, gate_up, d_gate_up, "silu", act),
        lambda d, gate_up, d_gate_up, act: gated_backward_reference(
            d, gate_up, d_gate_up, "silu", act
        ),
    )


def weight_bytes(shape: tuple[int, int], double: bool) -> int:
    """Codes, scales and values of a weight."""
    n = shape[0] * shape[1]
    blocks = n // BLOCK_SIZE
    scales = blocks + 4 * -(-blocks // 256) + 4 if double else 4 * blocks
    return n // 2 + scales + 2 * n


def weight_cases(device: str) -> Iterator[Case]:
    for double in (False, True):
        for shape in WEIGHTS:

            def make(shape: tuple[int, int] = shape, double: bool = double) -> Tensors:
                w = torch.randn(shape, device=device)
                stored = quantize_nf4(w, block_size=BLOCK_SIZE, double_quant=double)
                offsets = None if stored.offset is None else stored.offset.view(1)
                out = torch.empty(shape, dtype=C, device=device)
                return stored.codes, stored.absmax, stored.nested, offsets, out

            def call(
                function: Callable[..., None], shape: tuple[int, int] = shape
            ) -> Callable[..., None]:
                return lambda codes, absmax, nested, offsets, out: function(
                    codes, absmax, nested, offsets, (0,), BLOCK_SIZE, *shape, out
                )

            yield Case(
                weight_name(shape, double),
                weight_bytes(shape, double),
                make,
                call(nf4_dequantize),
                call(nf4_dequantize_reference),
            )


def weight_name(shape: tuple[int, int], double: bool) -> str:
    return f"nf4 {'double' if double else 'single'}, {shape[0]} x {shape[1]}"


def bitsandbytes_cases() -> Iterator[Case]:
    from bitsandbytes import functional

    for double in (False, True):
        for shape in WEIGHTS:

            def make(shape: tuple[int, int] = shape, double: bool = double) -> Tensors:
                w = torch.randn(shape, device="cuda", dtype=C)
                packed, state = functional.quantize_4bit(
                    w, blocksize=BLOCK_SIZE, compress_statistics=double, quant_type="nf4"
                )
                return packed, state, w

            def call(packed: Tensor, state: Any, out: Tensor) -> None:
                functional.dequantize_4bit(packed, state, out=out)

            yield Case(weight_name(shape, double), weight_bytes(shape, double), make, call, call)


def neg_case(moved: int) -> Case:
    half = moved // 4  # values of two bytes, half of them read and half written

    def make() -> Tensors:
        return tuple(torch.zeros(half, dtype=C, device="cuda") for _ in range(2))

    def call(a: Tensor, b: Tensor) -> None:
        torch.neg(a, out=b)

    return Case("neg", moved, make, call, call)


def copy_rate() -> float:
    """GB/s of a device-to-device copy of 1 GiB, counting what is read and what is written."""
    size = 1 << 30
    a, b = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * size / graph_time(lambda: b.copy_(a)) / 1e3


def time_case(case: Case, call: Callable[..., None], launches: int) -> float:
    """Microseconds of one call, over so many copies of the tensors that no cache holds them."""
    copies = min(launches, max(2, -(-TOUCHED // case.moved)))
    buffers = [case.make()]
    for _ in range(copies - 1):
        buffers.append(tuple(copied(t) for t in buffers[0]))
    # What is made at the first call (compiled kernels, tables) cannot be made in a capture.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(*buffers[0])
    torch.cuda.current_stream().wait_stream(stream)

    def launch_all() -> None:
        for i in range(launches):
            call(*buffers[i % copies])

    found = graph_time(launch_all) / launches
    buffers.clear()
    torch.cuda.empty_cache()
    return found


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def graph_time(launch: Callable[[], Any]) -> float:
    """Microseconds of a replay of what ``launch`` does: the median of five measurements."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    replays, found = 1, []
    for measurement in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        microseconds = start.elapsed_time(end) * 1e3 / replays
        if measurement == 1:  # the first replay warmed up; this one says how many take 4 ms
            replays = max(1, int(4000 / microseconds))
        elif measurement > 1:
            found.append(microseconds)
    return median(found)


if __name__ == "__main__":
    main()
