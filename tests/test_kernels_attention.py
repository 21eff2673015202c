"""Attention over rows that lie end to end, against fp64 and scaled_dot_product_attention.

Without a GPU the kernels run in Triton's interpreter, on a GPU compiled.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from triton_interpreter import DEVICE

# isort: split
from halfbyte.kernels import attention as file
from halfbyte.kernels import attention_efficient as efficient
from halfbyte.kernels import attention_kernels
from halfbyte.kernels.attention import attention_backward_reference, attention_reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of masked numbers, by NumPy

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
LOOK = "nothing may be written here"
POISON = 77.0
# Of the largest element: what rounding the products' operands and the results may cost.
TOLERANCE = {F32: 4e-6, F16: 2e-3, BF16: 1.6e-2}


class Case:
    """Random rows with their gradients upstream, and the results in fp64."""

    def __init__(
        self,
        lengths: Sequence[int],
        heads: int = 2,
        kv_heads: int = 1,
        head_dim: int = 16,
        dtype: torch.dtype = F32,
        window: int | None = None,
        max_seqlen: int | None = None,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.T, self.rows = sum(lengths), len(lengths)
        self.heads, self.kv_heads, self.head_dim, self.dtype = heads, kv_heads, head_dim, dtype
        self.window, self.max_seqlen = window, max_seqlen or max([*lengths, 1])
        self.scale = 1.3 / math.sqrt(head_dim)
        self.width, self.out_width = (heads + 2 * kv_heads) * head_dim, heads * head_dim
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
        self.qkv = torch.randn(self.T, self.width, generator=generator).to(DEVICE, dtype)
        self.d_out = torch.randn(self.T, self.out_width, generator=generator).to(DEVICE, dtype)

    def args(self) -> tuple[Any, ...]:
        return (self.max_seqlen, self.heads, self.kv_heads, self.head_dim, self.scale)

    def run(
        self, forward: Any = None, backward: Any = None, shape: Any = None
    ) -> dict[str, Tensor]:
        """What the kernels write, between values that they neither read nor write."""
        forward, backward = forward or file.attention, backward or file.attention_backward
        shape = (shape or file.lse_shape)(self.T, self.rows, self.max_seqlen, self.heads)
        lse = torch.full(shape, math.nan, device=DEVICE)
        delta = torch.full((self.heads, self.T), math.nan, device=DEVICE)
        qkv, d_out = self._between(self.qkv, math.nan), self._between(self.d_out, math.nan)
        out = self._between(torch.full_like(self.d_out, math.nan), POISON)
        d_qkv = self._between(torch.full_like(self.qkv, math.nan), POISON)
        borders = self.cu_seqlens
        forward(qkv, borders, *self.args(), out, lse, window=self.window)
        backward(d_out, qkv, out, lse, borders, *self.args(), d_qkv, delta, window=self.window)
        for view in (out, d_qkv):
            whole = view._base
            assert whole is not None
            assert (whole[0] == POISON).all(), LOOK
            assert (whole[-1] == POISON).all(), LOOK
            assert (whole[:, view.shape[1] :] == POISON).all(), LOOK
        return {"out": out, "lse": lse, "delta": delta, **self.parts(d_qkv)}

    def parts(self, d_qkv: Tensor) -> dict[str, Tensor]:
        widths = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        return dict(zip(("dq", "dk", "dv"), d_qkv.split(widths, 1), strict=True))

    def expected(self) -> dict[str, Tensor]:
        """The reference in fp64."""
        qkv, d_out = self.qkv.double(), self.d_out.double()
        out, d_qkv = torch.full_like(d_out, math.nan), torch.full_like(qkv, math.nan)
        lse, delta = (out.new_full((self.heads, self.T), math.nan) for _ in range(2))
        call = (*self.args(),)
        attention_reference(qkv, self.cu_seqlens, *call, out, lse, window=self.window)
        attention_backward_reference(
            d_out, qkv, out, lse, self.cu_seqlens, *call, d_qkv, delta, window=self.window
        )
        return {"out": out, "lse": lse, "delta": delta, **self.parts(d_qkv)}

    @staticmethod
    def _between(value: Tensor, around: float) -> Tensor:
        rows, columns = value.shape
        whole = torch.full((rows + 2, columns + 8), around, dtype=value.dtype, device=DEVICE)
        view = whole[1:-1, :columns]
        view.copy_(value)
        return view


def check(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, want in expected.items():
        bound = 2e-6 if name == "lse" else tolerance
        error = (found[name].double() - want).abs().max() / want.abs().max()
        assert error <= bound, f"{name}: {error:.2e}"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype", "window", "max_seqlen"),
    [
        (2, 2, 64, F16, None, 81),
        (2, 2, 64, F16, 70, 81),
        (2, 1, 64, BF16, None, 2048),
        (2, 1, 64, F32, 11, 81),
        (4, 2, 80, BF16, None, 81),
        (2, 2, 80, F16, 11, 2048),
        (8, 1, 16, F16, None, 81),
        (8, 1, 16, F16, 70, 2048),
        (2, 1, 16, F32, None, 2048),
        (2, 1, 128, F16, None, 2048),
        (2, 1, 128, BF16, 11, 81),
        (2, 2, 128, F32, None, 81),
    ],
)
def test_it_is_the_reference(
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    window: int | None,
    max_seqlen: int,
) -> None:
    """Rows of no token, of one, and of more than a block; block sizes of short and long rows."""
    lengths = [3, 0, 81, 1, 0, 0, 17]
    case = Case(lengths, heads, kv_heads, head_dim, dtype, window, max_seqlen)
    check(case.run(), case.expected(), TOLERANCE[dtype])


def test_blocks_without_masks() -> None:
    """A row of three blocks of the long kind, the last of them not full."""
    case = Case([5, 300], 2, 1, 32, F16, max_seqlen=1024)
    check(case.run(), case.expected(), TOLERANCE[F16])


def test_a_head_of_256() -> None:
    case = Case([9, 41], 2, 1, 256, F16)
    check(case.run(), case.expected(), TOLERANCE[F16])


@pytest.mark.parametrize("enough", [0, 20, 1000])
def test_a_group_of_heads_in_one_program_and_in_several(
    enough: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "ENOUGH_PROGRAMS", enough)
    case = Case([7, 33, 40], 8, 2)
    tiles = case.T // file.backward_tiles(16, case.max_seqlen, 4, False).block + case.rows
    assert file.key_splits(tiles, 8, 2) == {0: 1, 20: 2, 1000: 4}[enough]
    check(case.run(), case.expected(), TOLERANCE[F32])


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(sum),
    window=st.none() | st.integers(1, 45),
    spare=st.integers(0, 50),
    seed=st.integers(0, 99),
)
def test_any_rows(lengths: list[int], window: int | None, spare: int, seed: int) -> None:
    case = Case(lengths, 1, window=window, max_seqlen=max(lengths) + spare, seed=seed)
    check(case.run(), case.expected(), 4e-6)


def test_more_rows_than_a_program_looks_through_at_once() -> None:
    case = Case([1, 0, 2] * 43, 1, dtype=F16)
    assert case.rows > 128
    check(case.run(), case.expected(), TOLERANCE[F16])


def test_no_tokens() -> None:
    Case([0, 0]).run()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2)])
def test_the_reference_is_sdpa(heads: int, kv_heads: int, window: int | None) -> None:
    """Row by row with torch's attention and autograd."""
    case = Case([4, 0, 19, 1], heads, kv_heads, window=window)
    expected = case.expected()
    rows = zip(pairwise(case.cu_seqlens.tolist()), [4, 0, 19, 1], strict=True)
    for (start, stop), length in rows:
        if not length:
            continue
        row = case.qkv[start:stop].double().requires_grad_()
        q, k, v = (
            part.view(length, -1, case.head_dim).transpose(0, 1)[None]
            for part in case.parts(row).values()
        )
        seen = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()
        seen = seen.triu(1 - (window or length))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=case.scale, enable_gqa=True
        )
        out = out[0].transpose(0, 1).reshape(length, -1)
        (d_row,) = torch.autograd.grad(out, row, case.d_out[start:stop].double())
        found = {name: tensor[start:stop] for name, tensor in expected.items() if name != "lse"}
        torch.testing.assert_close(found["out"], out, rtol=1e-12, atol=1e-12)
        for name, grad in case.parts(d_row).items():
            torch.testing.assert_close(found[name], grad, rtol=1e-12, atol=1e-12)


def kept(found: dict[str, Tensor], start: int, stop: int) -> list[Tensor]:
    """Everything but the tokens [start, stop)."""
    columns = [found[n].T if n in ("lse", "delta") else found[n] for n in sorted(found)]
    return [torch.cat((t[:start], t[stop:])) for t in columns]


@pytest.mark.parametrize("dtype", [F32, F16])
def test_a_row_changes_no_bit_of_another_and_bits_repeat(dtype: torch.dtype) -> None:
    """Even one that turns infinite."""
    case = Case([20, 7, 33, 12], 2, 1, 16, dtype)
    first, again = case.run(), case.run()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
    case.qkv[20:27] = math.inf
    case.d_out[20:27] = -3
    for one, other in zip(kept(first, 20, 27), kept(case.run(), 20, 27), strict=True):
        assert torch.equal(one, other)


def test_a_row_has_the_same_bits_wherever_it_lies() -> None:
    lengths = [20, 7, 33, 12]
    case = Case(lengths, 2, 1, 32, F16)
    first = case.run()
    order = [2, 3, 0, 1]
    starts = case.cu_seqlens.tolist()
    places = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in order]).to(DEVICE)
    moved = Case([lengths[i] for i in order], 2, 1, 32, F16)
    moved.qkv, moved.d_out = case.qkv[places], case.d_out[places]
    for name, tensor in moved.run().items():
        want = first[name][:, places] if name in ("lse", "delta") else first[name][places]
        assert torch.equal(tensor, want), name


def test_they_compile_for_ampere_ada_and_hopper(tmp_path: Path) -> None:
    """In matrix instructions, loads running ahead, within the shared memory that there is."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_attention.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env=env | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    print(*(f"{k['kernel']} {k['case']}: {k['shared']} bytes" for k in kernels), sep="\n")
    assert {k["kernel"] for k in kernels} == {
        name for name in vars(attention_kernels) if name.endswith("_kernel")
    }
    for kernel in kernels:
        capability, head_dim, max_seqlen = kernel["case"]
        # Only long rows of wide heads take more, and only where a block may have 163 KiB.
        roomy = capability in (80, 90) and head_dim == 128 and max_seqlen > 512
        assert kernel["shared"] <= (163 if roomy else 99) * 1024
        if kernel["kernel"] in ("forward_kernel", "backward_kernel"):
            assert kernel["products"] > 0
            assert kernel["copies"] > 0


def test_configurations_divide() -> None:
    """The loop without masks ends where the tile begins."""
    for head_dim in file.HEAD_DIMS:
        for max_seqlen in (1, 512, 513, 8192):
            for element_size in (2, 4):
                for roomy in (False, True):
                    for table in (file.forward_tiles, file.backward_tiles):
                        cut = table(head_dim, max_seqlen, element_size, roomy)
                        assert cut.block % cut.step == 0


class OperatorInPlainPyTorch(TorchDispatchMode):
    """Stands for the memory-efficient operators, which a CPU does not have.

    By the schema's names; their layout as in PyTorch's own derivative formulas: q, k and v [1, T,
    heads, D], log-sums [rows, heads, ⌈longest / 32⌉ · 32].
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not name.startswith("_efficient_attention"):
            return func(*args, **(kwargs or {}))
        names = [a.name for a in func._schema.arguments]
        given_ = dict(zip(names, args, strict=False)) | (kwargs or {})
        q, k, v = (given_[n] for n in ("query", "key", "value"))
        assert q.shape == k.shape == v.shape
        assert given_["custom_mask_type"] == 1
        assert given_["dropout_p"] == 0
        longest, borders = given_["max_seqlen_q"], given_["cu_seqlens_q"]
        assert longest == given_["max_seqlen_k"] <= q.shape[1]
        _, T, heads, head_dim = q.shape
        call = (borders, longest, heads, heads, head_dim, given_["scale"])
        qkv = torch.cat((q, k, v), 2)[0].reshape(T, -1).double()
        out = qkv.new_empty(T, heads * head_dim)
        lse = qkv.new_empty(heads, T)
        window = given_.get("window_size")  # a mode is given no arguments that are their defaults
        attention_reference(qkv, *call, out, lse, window=window)
        padded = torch.full((len(borders) - 1, heads, -(-longest // 32) * 32), math.inf)
        for row, (start, stop) in enumerate(pairwise(borders.tolist())):
            padded[row, :, : stop - start] = lse[:, start:stop]
        if name == "_efficient_attention_forward":
            assert given_["compute_log_sumexp"]
            state = torch.zeros((), dtype=torch.int64)
            return out.to(q.dtype).view(q.shape), padded, state, state, longest, longest
        assert given_["num_splits_key"] == 1
        assert given_["out"].is_contiguous()
        torch.testing.assert_close(given_["logsumexp"], padded)
        grads = self._backward(qkv, given_["grad_out_"], lse, borders, given_["scale"], window)
        return *(g.to(q.dtype)[None] for g in grads), torch.empty(())

    @staticmethod
    def _backward(
        qkv: Tensor, d_out: Tensor, lse: Tensor, borders: Tensor, scale: float, window: int | None
    ) -> list[Tensor]:
        """dq, dk and dv [T, heads, D]; autograd is out of reach within a mode."""
        _, T, heads, head_dim = d_out.shape
        q, k, v = qkv.view(T, 3, heads, head_dim).permute(1, 2, 0, 3)
        d_o = d_out[0].double().transpose(0, 1)
        row = (torch.arange(T)[:, None] >= borders[1:]).sum(1)
        back = torch.arange(T)[:, None] - torch.arange(T)
        seen = (row[:, None] == row) & (back >= 0) & (back < (window or T))
        p = (q @ k.mT * scale - lse[:, :, None]).exp() * seen
        dp = d_o @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        return [t.transpose(0, 1) for t in (ds @ k, ds.mT @ q, p.mT @ d_o)]


def run_efficient(case: Case) -> dict[str, Tensor]:
    found = case.run(efficient.attention, efficient.attention_backward, efficient.lse_shape)
    starts = case.cu_seqlens.tolist()
    rows = [found["lse"][i, :, : b - a] for i, (a, b) in enumerate(pairwise(starts))]
    return {**found, "lse": torch.cat(rows, 1)}


def wanted_of_efficient(case: Case) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in case.expected().items() if name != "delta"}


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_the_memory_efficient_operator_is_called_as_its_schema_says(
    kv_heads: int, window: int | None
) -> None:
    case = Case([4, 0, 39, 1], 4, kv_heads, window=window, max_seqlen=500)
    if DEVICE == "cuda":
        pytest.skip("has the operator itself")
    with OperatorInPlainPyTorch():
        found = run_efficient(case)
    check(found, wanted_of_efficient(case), 2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 4, 64), (8, 1, 64), (4, 2, 80), (2, 1, 128)]
)
def test_memory_efficient_attention(
    heads: int, kv_heads: int, head_dim: int, window: int | None
) -> None:
    lengths = [3, 0, 200, 1, 0, 64, 17]
    case = Case(lengths, heads, kv_heads, head_dim, F16, window)
    first, again = run_efficient(case), run_efficient(case)
    check(first, wanted_of_efficient(case), TOLERANCE[F16])
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(first[name], again[name]), name


TINY_LLAMA = {"heads": 32, "kv_heads": 4, "head_dim": 64, "dtype": BF16}


def flash(case: Case) -> dict[str, Tensor]:
    """torch's flash attention, row by row."""
    out, d_qkv = torch.empty_like(case.d_out), torch.empty_like(case.qkv)
    for start, stop in pairwise(case.cu_seqlens.tolist()):
        row = case.qkv[start:stop].detach().requires_grad_()
        q, k, v = (
            part.view(stop - start, -1, case.head_dim).transpose(0, 1)[None]
            for part in case.parts(row).values()
        )
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            o = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=case.scale, enable_gqa=True
            )
        o = o[0].transpose(0, 1).reshape(stop - start, -1)
        (d_qkv[start:stop],) = torch.autograd.grad(o, row, case.d_out[start:stop])
        out[start:stop] = o.detach()
    return {"out": out, **case.parts(d_qkv)}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "lengths", [[512, 60, 100, 96], [186, 200, 170, 212], [2048, 1000]], ids=str
)
def test_it_is_as_near_to_fp64_as_flash_attention(lengths: list[int]) -> None:
    case = Case(lengths, **TINY_LLAMA)
    want, ours, theirs = case.expected(), case.run(), flash(case)
    check(ours, want, TOLERANCE[BF16])
    for name, tensor in theirs.items():
        errors = [(t.double() - want[name]).norm().item() for t in (ours[name], tensor)]
        print(f"{name}: ours {errors[0]:.3e}, flash attention {errors[1]:.3e}")
        assert errors[0] <= 1.5 * errors[1], name


@pytest.mark.gpu
@pytest.mark.parametrize("module", [file, efficient], ids=["triton", "efficient"])
def test_a_captured_graph_serves_other_borders(module: Any) -> None:
    """Bits of the replay are those of a launch of its own."""
    lengths = [[300, 60, 0, 152], [0, 512, 0, 0], [1, 2, 500, 9]]
    case = Case(lengths[0], **TINY_LLAMA, max_seqlen=512)
    shape = module.lse_shape(case.T, case.rows, 512, case.heads)
    out, d_qkv = torch.empty_like(case.d_out), torch.empty_like(case.qkv)
    lse, delta = torch.zeros(shape, device=DEVICE), torch.zeros(case.heads, case.T, device=DEVICE)

    def both() -> None:
        module.attention(case.qkv, case.cu_seqlens, *case.args(), out, lse)
        module.attention_backward(
            case.d_out, case.qkv, out, lse, case.cu_seqlens, *case.args(), d_qkv, delta
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
    for row_lengths in lengths:
        case.cu_seqlens.copy_(torch.tensor([0, *row_lengths]).cumsum(0))
        graph.replay()
        replayed = out.clone(), d_qkv.clone()
        both()
        assert torch.equal(replayed[0], out)
        assert torch.equal(replayed[1], d_qkv)
        want = case.expected()
        check({"out": out, **case.parts(d_qkv)}, {n: want[n] for n in ("out", "dk")}, 1.6e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "max_seqlen", "window", "dtype"),
    [
        *((d, m, None, BF16) for d in file.HEAD_DIMS for m in (512, 2048)),
        *((d, m, 100, BF16) for d in (64, 80) for m in (512, 2048)),
        *((d, 512, w, F32) for d in (64, 256) for w in (None, 100)),
        (64, 2048, None, F16),
    ],
)
def test_every_configuration_on_a_gpu(
    head_dim: int, max_seqlen: int, window: int | None, dtype: torch.dtype
) -> None:
    case = Case([300, 1, 0, 129], 4, 2, head_dim, dtype, window, max_seqlen)
    check(case.run(), case.expected(), TOLERANCE[dtype])
