"""The element-wise kernels against fp64, autograd, transformers and bitsandbytes.

On a machine without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

pytest.importorskip("triton")

from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from halfbyte.kernels import gated as gated_file
from halfbyte.kernels import gather_rows as gather_file
from halfbyte.kernels import nf4_dequantize as nf4_file
from halfbyte.kernels import rms_norm as norm_file
from halfbyte.kernels import rope as rope_file
from halfbyte.kernels.nf4 import dequantize_blocks, dequantize_scales

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BELOW = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
if DEVICE == "cpu":
    BELOW[torch.bfloat16] *= 2  # the interpreter truncates where a GPU rounds to nearest
FP32 = 4e-6  # what a few fp32 operations, a GPU's fast exp among them, may be off by

Kernel = Callable[..., None]


def both(name: str) -> list[Any]:
    """A kernel and its reference, as parameters of a test."""
    file = {"rms": norm_file, "rope": rope_file, "gated": gated_file}[name.split("_")[0]]
    reference = "rope_reference_" if name == "rope_" else f"{name}_reference"
    return [pytest.param(getattr(file, n), id=n) for n in (name, reference)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(DEVICE, dtype)


class Gaps:
    """Makes strided tensors with a value between their rows that has to be there afterwards."""

    def __init__(self) -> None:
        self.made: list[tuple[Tensor, int]] = []

    def __call__(self, value: Tensor | tuple[int, int], dtype: torch.dtype, gap: int = 5) -> Tensor:
        rows, columns = value.shape if isinstance(value, Tensor) else value
        whole = torch.full((rows + 2, columns + gap), 77.0, dtype=dtype, device=DEVICE)
        view = whole[1:-1, :columns]
        # What nobody writes stays infinite, which no tolerance lets pass.
        view.copy_(value) if isinstance(value, Tensor) else view.fill_(torch.inf)
        self.made.append((whole, columns))
        return view

    def check(self) -> None:
        for whole, columns in self.made:
            assert (whole[:, columns:] == 77.0).all()
            assert (whole[[0, -1]] == 77.0).all()


@pytest.fixture
def gaps() -> Any:
    made = Gaps()
    yield made
    made.check()


def assert_rounded(found: Tensor, exact: Tensor, arithmetic: Tensor | float | None = None) -> None:
    """``found`` is ``exact`` (fp64) rounded once, but for fp32 arithmetic on ``arithmetic``."""
    assert exact.dtype == torch.float64
    size = exact.abs().amax() if arithmetic is None else arithmetic
    smallest = torch.finfo(found.dtype).smallest_normal * BELOW[found.dtype]
    bound = BELOW[found.dtype] * exact.abs() + FP32 * size + 2 * smallest
    error = (found.double() - exact).abs()
    assert (error <= bound).all(), f"{(error / bound).max():.3g} times the bound"


def norm(s: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    """RMSNorm in fp64."""
    w = weight.double() + unit_offset
    return w * s * torch.rsqrt(s.square().mean(dim=1, keepdim=True) + eps)


NORMS = [(5, 64), (7, 100), (3, 2048), (2, 8200), (9, 17)]


@pytest.mark.parametrize("kernel", both("rms_norm"))
@pytest.mark.parametrize("shape", NORMS, ids=str)
@pytest.mark.parametrize("added", ["in place", "apart", "nothing"])
@pytest.mark.parametrize("wide", [True, False], ids=["fp32 stream", "narrow stream"])
@pytest.mark.parametrize("c", DTYPES, ids=str)
def test_rms_norm(
    kernel: Kernel, shape: tuple[int, int], added: str, wide: bool, c: torch.dtype, gaps: Gaps
) -> None:
    x = randn(*shape, dtype=torch.float32 if wide else c) * 3
    before = x.clone()
    weight = randn(shape[1], dtype=c if wide else torch.float32, seed=1)
    y = None if added == "nothing" else gaps(randn(*shape, seed=2), c)
    stream = {"in place": x, "apart": torch.full_like(x, torch.inf), "nothing": None}[added]
    out, rstd = gaps(shape, c), torch.full((shape[0],), torch.inf, device=DEVICE)
    unit_offset, eps = shape[0] % 2 == 0, 1e-2
    kernel(x, y, weight, eps, stream, out, rstd, unit_offset=unit_offset)
    s = x
    if y is not None:
        assert stream is not None
        s = stream
        assert_rounded(s, before.double() + y.double())
    if added != "in place":
        assert torch.equal(x, before)
    exact = norm(s.double(), weight, eps, unit_offset)
    assert_rounded(rstd, torch.rsqrt(s.double().square().mean(dim=1) + eps))
    assert_rounded(out, exact, arithmetic=exact.abs())


@pytest.mark.parametrize("kernel", both("rms_norm_backward"))
@pytest.mark.parametrize("shape", NORMS, ids=str)
@pytest.mark.parametrize("first", [False, True], ids=["added", "first"])
@pytest.mark.parametrize("wide", [True, False], ids=["fp32 stream", "narrow stream"])
@pytest.mark.parametrize("c", DTYPES, ids=str)
def test_rms_norm_backward(
    kernel: Kernel, shape: tuple[int, int], first: bool, wide: bool, c: torch.dtype, gaps: Gaps
) -> None:
    stream_dtype = torch.float32 if wide else c
    stream = randn(*shape, dtype=stream_dtype) * 3
    weight = randn(shape[1], dtype=c if wide else torch.float32, seed=1)
    d_out = gaps(randn(*shape, seed=2), c)
    unit_offset, eps = shape[0] % 2 == 0, 1e-2
    rstd = torch.rsqrt(stream.float().square().mean(dim=1) + eps)
    s = stream.double().requires_grad_()
    (exact,) = torch.autograd.grad(norm(s, weight, eps, unit_offset), s, d_out.double())
    before = randn(*shape, dtype=stream_dtype, seed=3)
    d_stream = torch.full_like(before, torch.inf) if first else before.clone()
    d_stream_c = gaps(shape, c) if wide or first else None
    kernel(d_out, stream, rstd, weight, d_stream, d_stream_c, first=first, unit_offset=unit_offset)
    if not first:
        exact = exact + before.double()
    assert_rounded(d_stream, exact)
    if d_stream_c is not None:
        assert_rounded(d_stream_c, exact)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, ids: Tensor, heads: int) -> Tensor:
    """transformers' rotation of [T, heads · head_dim], in fp64."""
    c, s = (torch.cat([t, t], dim=1).double()[ids.long()][None] for t in (cos, sin))
    q = x.unflatten(1, (heads, -1)).transpose(0, 1)[None]
    turned = apply_rotary_pos_emb(q, q, c, s)[0]
    return turned[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("kernel", both("rope_"))
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "gap"),
    [(70, 5, 64, 0), (33, 3, 128, 24), (9, 7, 80, 3), (5, 2, 6, 8), (3, 1, 256, 1)],
)
@pytest.mark.parametrize("c", DTYPES, ids=str)
def test_rope(
    kernel: Kernel,
    ids_dtype: torch.dtype,
    tokens: int,
    heads: int,
    head_dim: int,
    gap: int,
    c: torch.dtype,
    gaps: Gaps,
) -> None:
    angles = torch.rand(90, head_dim // 2, generator=generator()) * 100
    cos, sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
    ids = torch.randint(0, 90, (tokens,), generator=generator(1)).to(DEVICE, ids_dtype)
    width = heads * head_dim
    qkv = gaps(randn(tokens, width + 11, seed=2), c, gap)
    before = qkv.double()
    kernel(qkv, cos, sin, ids, heads, head_dim)
    x = before[:, :width].requires_grad_()
    exact = rotated(x, cos, sin, ids, heads)
    assert_rounded(qkv[:, :width], exact.detach())
    assert torch.equal(qkv[:, width:].double(), before[:, width:])
    # The backward pass: the gradient of the values with respect to what was turned.
    d = gaps(randn(tokens, width + 11, seed=3), c, gap)
    (d_exact,) = torch.autograd.grad(exact, x, d[:, :width].double())
    kernel(d, cos, sin, ids, heads, head_dim, inverse=True)
    assert_rounded(d[:, :width], d_exact)


def activated(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    approximate = {"gelu": "none", "gelu_tanh": "tanh"}[activation]
    return torch.nn.functional.gelu(gate, approximate=approximate)


def gates(tokens: int, width: int, c: torch.dtype, gaps: Gaps, gap: int) -> Tensor:
    """Gate and up; some gates so large that an exp overflows or vanishes."""
    value = randn(tokens, 2 * width)
    value[:, :width] *= 3
    extreme = torch.tensor([0.0, -0.0, 12.0, -12.0, 95.0, -95.0, 1e4, -1e4])
    count = min(width, len(extreme))
    value[0, :count] = extreme[:count]
    return gaps(value, c, gap)


GATED = [(5, 100, 5), (3, 1025, 24), (1, 7, 0), (2, 2048, 8)]


@pytest.mark.parametrize("kernel", both("gated"))
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("tokens", "width", "gap"), GATED)
@pytest.mark.parametrize("c", DTYPES, ids=str)
def test_gated(
    kernel: Kernel,
    activation: str,
    tokens: int,
    width: int,
    gap: int,
    c: torch.dtype,
    gaps: Gaps,
) -> None:
    gate_up, out = gates(tokens, width, c, gaps, gap), gaps((tokens, width), c, gap)
    kernel(gate_up, out, activation)
    gate, up = gate_up.double().chunk(2, dim=1)
    # A share of the gate off by fp32's rounding is off by that much of gate · up.
    size = (1 + gate.abs().clamp(max=100)) * up.abs()
    assert_rounded(out, activated(gate, activation) * up, arithmetic=size)


@pytest.mark.parametrize("kernel", both("gated_backward"))
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("where", ["apart", "in place", "without act"])
@pytest.mark.parametrize(("tokens", "width", "gap"), GATED)
@pytest.mark.parametrize("c", DTYPES, ids=str)
def test_gated_backward(
    kernel: Kernel,
    activation: str,
    where: str,
    tokens: int,
    width: int,
    gap: int,
    c: torch.dtype,
    gaps: Gaps,
) -> None:
    gate_up = gates(tokens, width, c, gaps, gap)
    d_act = gaps(randn(tokens, width, seed=1), c, gap)
    leaf, d = gate_up.double().requires_grad_(), d_act.double()
    gate, up = leaf.chunk(2, dim=1)
    value = activated(gate, activation) * up
    (exact,) = torch.autograd.grad(value, leaf, d)
    if where == "in place":
        d_gate_up, act = gate_up, d_act
    else:
        d_gate_up = gaps((tokens, 2 * width), c, gap)
        act = gaps((tokens, width), c, gap) if where == "apart" else None
    kernel(d_act, gate_up, d_gate_up, activation, act)
    share = (1 + gate.abs().clamp(max=100)).detach()
    size = torch.cat([share * (d * up).abs(), share * d.abs()], dim=1).detach()
    assert_rounded(d_gate_up, exact, arithmetic=size)
    if act is not None:
        assert_rounded(act, value.detach(), arithmetic=share * up.detach().abs())


def stored(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 values as a kernel stores them: rounded to nearest, but bf16 in the interpreter."""
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        exact = (exact.view(torch.int32) & -65536).view(torch.float32)
    return exact.to(dtype)


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("c", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("block_size", "columns", "parts", "gap", "skip"),
    [
        (64, 256, (64, 128, 5), 24, 0),
        (64, 128, (256, 128, 128, 3), 5, 0),
        (32, 96, (256, 1), 0, 0),
        (64, 64, (7,), 1, 1),  # codes that do not begin at a word
        (34, 68, (128, 9), 3, 0),  # blocks that are not whole words
        (4096, 4096, (9,), 8, 0),
        (48, 144, (3,), 8, 0),
    ],
)
def test_nf4_dequantize(
    double: bool,
    c: torch.dtype,
    block_size: int,
    columns: int,
    parts: tuple[int, ...],
    gap: int,
    skip: int,
    gaps: Gaps,
) -> None:
    """All codes, and scales of which some round differently in a fused multiply-add."""
    rows = sum(parts)
    random = generator(rows)
    count = rows * columns // 2
    codes = torch.randint(0, 256, (skip + count,), dtype=torch.uint8, generator=random)
    codes = codes.to(DEVICE)[skip:]
    per_row = columns // block_size
    blocks = rows * per_row
    part_blocks = tuple(sum(parts[:i]) * per_row for i in range(len(parts)))
    if double:
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=random).to(DEVICE)
        nested = torch.rand(-(-blocks // 256), generator=random).to(DEVICE)
        offsets = torch.rand(len(parts), generator=random).to(DEVICE)
        ends = (*part_blocks[1:], blocks)
        scales = torch.cat(
            [
                dequantize_scales(absmax[a:b], nested[a // 256 : -(-b // 256)], offset)
                for a, b, offset in zip(part_blocks, ends, offsets, strict=True)
            ]
        )
    else:
        absmax = scales = torch.rand(blocks, generator=random).to(DEVICE)
        nested = offsets = None
    exact = dequantize_blocks(codes, scales, block_size, rows * columns, torch.float32)
    args = (codes, absmax, nested, offsets, part_blocks, block_size, rows, columns)
    out, plain = gaps((rows, columns), c, gap), gaps((rows, columns), c, gap)
    nf4_file.nf4_dequantize(*args, out)
    assert torch.equal(out, stored(exact, c).view(rows, columns))
    nf4_file.nf4_dequantize_reference(*args, plain)
    assert torch.equal(plain, exact.to(c).view(rows, columns))


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_nf4_dequantize_is_that_of_bitsandbytes(double: bool) -> None:
    """Joined q, k and v of its own codes and scales."""
    functional = pytest.importorskip("bitsandbytes.functional")
    columns, codes, absmax, nested, offsets, expected = 256, [], [], [], [], []
    for number, rows in enumerate((128, 64, 64)):
        weight = randn(rows, columns, seed=number) * 0.02
        packed, state = functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=double, quant_type="nf4"
        )
        codes.append(packed.view(-1))
        absmax.append(state.absmax)
        if double:
            nested.append(state.state2.absmax)
            offsets.append(state.offset.view(1))
        expected.append(functional.dequantize_4bit(packed, state))
    out = torch.empty(256, columns, device=DEVICE)
    nf4_file.nf4_dequantize(
        torch.cat(codes),
        torch.cat(absmax),
        torch.cat(nested) if double else None,
        torch.cat(offsets) if double else None,
        (0, 512, 768),
        64,
        256,
        columns,
        out,
    )
    assert torch.equal(out, torch.cat(expected))


def test_they_compile_for_turing_ampere_and_hopper(tmp_path: Path) -> None:
    """Within a T4's shared memory, in 16-byte accesses, and NF4 without a fused multiply-add."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_elementwise.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env=env | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    print(*(f"{k['kernel']} sm_{k['capability']}: {k['shared']} bytes" for k in kernels), sep="\n")
    assert {(k["kernel"], k["capability"]) for k in kernels} == {
        (name, capability)
        for name in (
            "_rms_norm",
            "_rms_norm_backward",
            "_rope",
            "_gated",
            "_gated_backward",
            "_nf4_dequantize",
        )
        for capability in (75, 80, 90)
    }
    for kernel in kernels:
        assert kernel["bytes"] > 0
        assert kernel["shared"] <= 65536
        if kernel["kernel"] == "_nf4_dequantize":
            assert kernel["fused"] == 0
        else:
            assert "ld.global.v4.b32" in kernel["loads"]
            assert "st.global.v4.b32" in kernel["stores"]


@pytest.mark.parametrize("where", ["device", "pinned"])
@pytest.mark.parametrize("width", [8, 70, 2048, 2560])
def test_gathered_rows_are_the_tables(where: str, width: int) -> None:
    table = torch.randn(50, width).to(torch.float16)
    expected = table[[3, 0, 49, 7, 3]]
    table = gather_file.pinned(table) if where == "pinned" else table.to(DEVICE)
    ids = torch.tensor([3, 0, 49, 7, 3], device=DEVICE)
    out = torch.full((5, width + 3), 7.0, dtype=torch.float16, device=DEVICE)
    gather_file.gather_rows(table, ids, out[:, :width])
    assert torch.equal(out[:, :width].cpu(), expected)
    assert (out[:, width:] == 7.0).all()
    assert torch.equal(gather_file.fetch_rows(table, ids).cpu(), expected)
