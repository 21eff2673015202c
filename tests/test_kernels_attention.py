"""Attention over rows that lie end to end, against fp64 and scaled_dot_product_attention.

Without a GPU the kernels run in Triton's interpreter, on a GPU compiled.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_case import BF16, DEVICE, F16, F32, TOLERANCE, Case, check

# isort: split
from halfbyte.kernels import attention as file
from halfbyte.kernels import attention_efficient as efficient
from halfbyte.kernels import attention_kernels

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of masked numbers, by NumPy


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
