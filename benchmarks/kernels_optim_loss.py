"""The kernels of AdamW and of the cross-entropy on a GPU, beside plain PyTorch.

    python benchmarks/kernels_optim_loss.py [--tiles] [--write]

A step of AdamW with its scalars, for the adapter of a TinyLlama (4.5 million parameters) and for
40 million; rows of logits; the head with its loss and gradient, beside its two products alone
("floor") and the chunked loss of ``kernels/loss.py``. Each is a CUDA graph of 20 launches (plain
PyTorch 2) over tensors that in turn go through more memory than the L2 cache holds. The first line
is the ceiling: a copy of 1 GiB. ``--tiles`` times other sizes of a program as well; ``--write``
writes results/kernels_optim_loss.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.kernels import adamw, cross_entropy
from halfbyte.kernels.cross_entropy import (
    cross_entropy_rows_,
    cross_entropy_rows_reference,
    head_loss,
)
from halfbyte.kernels.loss import cross_entropy_sum
from halfbyte.optim.choose import make_optimizer
from halfbyte.optim.flat import flatten_parameters
from halfbyte.recipe.schema import Optimizer, TrainingRecipe
from record import write_results

C = torch.bfloat16
LAUNCHES, LAUNCHES_PLAIN = 20, 2  # in a graph
TOUCHED = 256 << 20  # bytes that the tensors of a case add up to: five times an H100's L2
CHUNK_BYTES = 128 << 20  # of logits
ROWS_OF_MILLIONS = {"4.5M": 2200, "40M": 19456}  # of 2,048 parameters
HEADS = ((768, 32000, 2048), (16384, 32000, 2048), (2048, 128256, 4096))  # tokens, V, hidden

ADAMW_TILES = ((1, 1), (2, 1), (4, 1), (4, 4), (8, 4))  # blocks of a program, warps
ROW_TILES = ((1024, 2), (1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16))

Launch = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """``make(True)`` gives our launch on tensors of its own, ``make(False)`` PyTorch's."""

    name: str
    make: Callable[[bool], Launch]
    moved: int = 0  # bytes that one launch has to move
    operations: int = 0
    floor: Callable[[], Launch] | None = None  # what no kernel of ours takes part in


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiles", action="store_true", help="time other sizes of a program too")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    torch.manual_seed(0)
    ceiling = copy_rate()
    rows = [row("copy of 1 GiB", "pytorch", "rate", ceiling, "GB/s")]
    print(f"{torch.cuda.get_device_name()}, a copy of 1 GiB: {ceiling:,.0f} GB/s")
    print(
        f"{'':40}{'us':>9}{'GB/s':>8}{'of copy':>9}{'TFLOP/s':>9}{'floor us':>10}{'plain us':>10}"
    )
    for case in [*adamw_cases("cuda"), *row_cases("cuda"), *head_cases("cuda")]:
        ours = time_case(case, lambda case=case: case.make(True), LAUNCHES)
        floor = None if case.floor is None else time_case(case, case.floor, LAUNCHES)
        plain = time_case(case, lambda case=case: case.make(False), LAUNCHES_PLAIN)
        speed = case.moved / ours / 1e3
        tera = case.operations / ours / 1e6
        print(
            f"{case.name:40}{ours:9.2f}"
            + (f"{speed:8,.0f}{speed / ceiling:9.0%}" if case.moved else " " * 17)
            + (f"{tera:9.0f}" if case.operations else " " * 9)
            + (f"{floor:10.1f}" if floor is not None else " " * 10)
            + f"{plain:10.1f}",
            flush=True,
        )
        rows += [
            row(case.name, "halfbyte", "time", ours, "us"),
            row(case.name, "pytorch", "time", plain, "us"),
        ]
        if case.moved:
            rows.append(row(case.name, "halfbyte", "rate", speed, "GB/s"))
        if case.operations:
            rows.append(row(case.name, "halfbyte", "rate", tera, "TFLOP/s"))
        if floor is not None:
            rows.append(row(case.name, "products alone", "time", floor, "us"))
    if args.tiles:
        time_tiles()
    if args.write:
        write_results("kernels_optim_loss", rows, device=torch.cuda.get_device_name())


def row(case: str, tool: str, metric: str, value: float, unit: str) -> dict[str, Any]:
    return {"case": case, "tool": tool, "metric": metric, "value": value, "unit": unit}


def adamw_cases(device: str, sizes: dict[str, int] = ROWS_OF_MILLIONS) -> Iterator[Case]:
    # p is read and written and g is read, each in 4 bytes; so are both moments, in 1 byte or 4.
    yes, lr = torch.tensor(True, device=device), torch.tensor(1e-4, device=device)
    clip_scale = torch.tensor(0.5, device=device)

    def maker(name: Optimizer, length: int, shadow: bool) -> Callable[[bool], Launch]:
        def make(ours: bool) -> Launch:
            parameter = nn.Parameter(torch.randn(length, 2048, device=device))
            flat = flatten_parameters({"p": parameter})
            optimizer = make_optimizer(name, flat, TrainingRecipe(), use_kernels=ours)
            if shadow:
                optimizer.shadow = flat.data.to(C)
            flat.grad.normal_(std=1e-3)
            return lambda: optimizer.step(lr, clip_scale, yes)

        return make

    for label, length in sizes.items():
        n = length * 2048
        yield Case(f"adamw_8bit, {label}", maker("adamw_8bit", length, False), n * 16)
        yield Case(f"adamw_8bit, {label}, bf16 copy", maker("adamw_8bit", length, True), n * 18)
        yield Case(f"adamw, {label}", maker("adamw", length, False), n * 28)


def row_cases(device: str, heads: tuple[tuple[int, int, int], ...] = HEADS) -> Iterator[Case]:
    for tokens, vocabulary, _ in heads:
        length = min(tokens, CHUNK_BYTES // (2 * vocabulary))

        def make(ours: bool, length: int = length, vocabulary: int = vocabulary) -> Launch:
            logits = torch.randn(length, vocabulary, device=device).to(C)
            labels = torch.randint(0, vocabulary, (length,), device=device)
            loss = torch.empty(length, device=device)
            scale = torch.tensor(1.0 / length, device=device)
            function = cross_entropy_rows_ if ours else cross_entropy_rows_reference
            return lambda: function(logits, labels, loss, scale)

        yield Case(f"cross_entropy, {length} x {vocabulary}", make, length * vocabulary * 4)


def head_cases(device: str, heads: tuple[tuple[int, int, int], ...] = HEADS) -> Iterator[Case]:
    for tokens, vocabulary, width in heads:
        hidden = torch.randn(tokens, width, device=device).to(C)
        weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(C)
        labels = torch.randint(0, vocabulary, (tokens,), device=device)
        arguments = (hidden, weight, labels)

        def make(ours: bool, arguments: tuple[Tensor, ...] = arguments) -> Launch:
            return head_launch(*arguments) if ours else plain_head_launch(*arguments)

        def products(arguments: tuple[Tensor, ...] = arguments) -> Launch:
            return products_launch(*arguments)

        operations = 4 * tokens * vocabulary * width
        name = f"head_loss, {tokens} x {vocabulary} x {width}"
        yield Case(name, make, operations=operations, floor=products)


def head_launch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Launch:
    d_hidden = torch.empty_like(hidden)
    scale = torch.tensor(1.0 / len(hidden), device=hidden.device)
    return lambda: head_loss(
        hidden,
        weight,
        labels,
        scale,
        d_hidden,
        scale=1.0,
        softcap=None,
        chunk_bytes=CHUNK_BYTES,
    )


def plain_head_launch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Launch:
    leaf = hidden.clone().requires_grad_()

    def launch() -> object:
        return torch.autograd.grad(cross_entropy_sum(leaf, weight, labels, len(leaf)), leaf)

    return launch


def products_launch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Launch:
    """The head's two products as :func:`head_loss` makes them, and nothing else."""
    rows = min(len(hidden), CHUNK_BYTES // (2 * len(weight)))
    buffer = hidden.new_empty(rows, len(weight))
    d_hidden = torch.empty_like(hidden)

    def launch() -> None:
        for part, out in zip(hidden.split(rows), d_hidden.split(rows), strict=True):
            logits = buffer[: len(part)]
            torch.mm(part, weight.t(), out=logits)
            torch.mm(logits, weight, out=out)

    return launch


def time_tiles() -> None:
    """Programs of other sizes, for whoever sets the numbers in the kernels' files."""
    kept = adamw._BLOCKS_8BIT, adamw._WARPS_8BIT
    for case in adamw_cases("cuda"):
        if "adamw_8bit" in case.name and "copy" not in case.name:
            found = []
            for tile in ADAMW_TILES:
                adamw._BLOCKS_8BIT, adamw._WARPS_8BIT = tile
                found.append((time_case(case, lambda case=case: case.make(True), LAUNCHES), tile))
            print(case.name, *(f"{tile}: {us:.1f} us" for us, tile in found), sep="  ")
    adamw._BLOCKS_8BIT, adamw._WARPS_8BIT = kept
    names = ("_BLOCK_SHORT", "_WARPS_SHORT", "_BLOCK_LONG", "_WARPS_LONG")
    kept_rows = [getattr(cross_entropy, name) for name in names]
    for case in row_cases("cuda"):
        found = []
        for tile in ROW_TILES:
            for name, value in zip(names, tile * 2, strict=True):
                setattr(cross_entropy, name, value)
            found.append((time_case(case, lambda case=case: case.make(True), LAUNCHES), tile))
        print(case.name, *(f"{tile}: {us:.1f} us" for us, tile in found), sep="  ")
    for name, value in zip(names, kept_rows, strict=True):
        setattr(cross_entropy, name, value)


def time_case(case: Case, make: Callable[[], Launch], launches: int) -> float:
    """Microseconds of one launch: the median of five replays of a graph of ``launches``."""
    # Products as long as these keep nothing in the cache for the next launch.
    sets = 1 if case.operations else max(1, min(launches, -(-TOUCHED // case.moved)))
    ready = [make() for _ in range(sets)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and fills cuBLAS's workspace
        for launch in ready:
            launch()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            ready[i % sets]()
    times = []
    for _ in range(6):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / launches)
    return median(times[1:])


def copy_rate() -> float:
    """GB/s of a copy of 1 GiB, reading and writing counted."""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    case = Case("copy", lambda _: lambda: target.copy_(source), moved=2 << 30)
    return case.moved / time_case(case, lambda: case.make(True), 4) / 1e3


if __name__ == "__main__":
    main()
