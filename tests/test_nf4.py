"""NF4 equals bitsandbytes' bit for bit."""

from __future__ import annotations

import pytest
import torch

from halfbyte.kernels.nf4 import CODE_BOOK, dynamic_map, quantize_scales
from halfbyte.quant.nf4 import quantize_nf4

functional = pytest.importorskip("bitsandbytes.functional")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Normal values, with a block of zeros, ties between codes and one outlier."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    flat = w.view(-1)
    flat[:64] = 0.0
    book = torch.tensor(CODE_BOOK)
    flat[64:79] = (book[:-1] + book[1:]) / 2
    flat[79] = 1.0
    flat[200] = 7.0
    return w.to(dtype)


def test_tables_are_those_of_bitsandbytes() -> None:
    assert torch.equal(torch.tensor(CODE_BOOK), functional.get_4bit_type("nf4", device="cpu"))
    for signed in (True, False):
        assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed=signed))


def dequantized(
    codes: torch.Tensor,
    scales: torch.Tensor,
    block_size: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> torch.Tensor:
    """bitsandbytes' values; its AVX-512 code takes a wrong scale where a block spans rows."""
    if shape[-1] % block_size == 0:
        op = torch.ops.bitsandbytes.dequantize_4bit
        return op(codes, scales, block_size, "nf4", shape, dtype)
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    book = functional.get_4bit_type("nf4", device="cpu")
    return _dequantize_4bit_compute(codes.view(-1), scales, book, block_size, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [64, 256, 4096])
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("shape", [(96, 128), (512, 4096), (37, 101), (5, 64)], ids=str)
def test_codes_scales_and_values(
    shape: tuple[int, int], double_quant: bool, block_size: int, dtype: torch.dtype
) -> None:
    w = weights(shape, dtype)
    ours = quantize_nf4(w, block_size=block_size, double_quant=double_quant)
    codes, state = functional.quantize_4bit(
        w, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
    )
    assert torch.equal(ours.codes, codes.view(-1))
    assert torch.equal(ours.absmax, state.absmax)
    if double_quant:
        assert torch.equal(ours.nested, state.state2.absmax)
        assert torch.equal(ours.offset, state.offset)
    scales = state.absmax
    if double_quant:
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(ours.scales(), scales)
    for out in DTYPES:
        assert torch.equal(ours.dequantize(out), dequantized(codes, scales, block_size, shape, out))
    stored = state.absmax.numel() * state.absmax.element_size() + codes.numel()
    if double_quant:
        stored += 4 * state.state2.absmax.numel() + 4
    assert ours.nbytes == stored


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights((300, 101), torch.float32)
    whole = quantize_nf4(w)
    monkeypatch.setattr("halfbyte.kernels.nf4._CHUNK", 1000)
    parts = quantize_nf4(w)
    assert all(torch.equal(t, parts.tensors()[n]) for n, t in whole.tensors().items())
    assert torch.equal(whole.dequantize(torch.float32), parts.dequantize(torch.float32))


def test_codes_of_two_million_scales() -> None:
    """So many that a quotient in place of a product with a reciprocal shows: in four of these."""
    absmax = torch.rand(2_000_017, generator=torch.Generator().manual_seed(4)) * 0.05
    codes, nested, offset = quantize_scales(absmax)
    theirs, state = functional.quantize_blockwise(absmax - offset, blocksize=256)
    assert torch.equal(codes, theirs)
    assert torch.equal(nested, state.absmax)
