"""NF4 on a GPU equals what bitsandbytes makes there, bit for bit."""

from __future__ import annotations

import pytest
import torch

from halfbyte.kernels.nf4_dequantize import nf4_dequantize
from halfbyte.quant.nf4 import quantize_nf4

functional = pytest.importorskip("bitsandbytes.functional")
pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Small ones, and all of TinyLlama's: q and o, k and v, gate and up, down.
SHAPES = [(64, 64), (96, 128), (2048, 2048), (256, 2048), (5632, 2048), (2048, 5632)]


def weights(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Normal values, a block of zeros and an outlier."""
    generator = torch.Generator("cuda").manual_seed(0)
    w = torch.randn(shape, generator=generator, device="cuda") * 0.02
    w.view(-1)[:64] = 0.0
    w.view(-1)[200] = 7.0
    return w.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_scales_and_values(
    shape: tuple[int, int], double_quant: bool, dtype: torch.dtype
) -> None:
    w = weights(shape, dtype)
    ours = quantize_nf4(w, double_quant=double_quant)
    codes, state = functional.quantize_4bit(
        w, blocksize=64, compress_statistics=double_quant, quant_type="nf4"
    )
    assert torch.equal(ours.codes, codes.view(-1))
    assert torch.equal(ours.absmax, state.absmax)
    scales = state.absmax
    if double_quant:
        assert torch.equal(ours.nested, state.state2.absmax)
        assert torch.equal(ours.offset, state.offset)
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(ours.scales(), scales)
    # What a layer computes with is of the model's type, whatever the checkpoint was stored in.
    for c in DTYPES:
        expected = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, 64, "nf4", shape, c)
        assert torch.equal(ours.dequantize(c), expected)
        out = torch.empty(shape, dtype=c, device="cuda")
        nf4_dequantize(
            ours.codes,
            ours.absmax,
            ours.nested,
            None if ours.offset is None else ours.offset.view(1),
            (0,),
            64,
            *shape,
            out,
        )
        assert torch.equal(out, expected)


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_the_cpu_makes_the_same_codes(double_quant: bool) -> None:
    w = weights((2048, 2048), torch.bfloat16)
    here, there = (quantize_nf4(t, double_quant=double_quant) for t in (w, w.cpu()))
    # A block of zeros, the first one, has other codes on a GPU, as with bitsandbytes.
    assert torch.equal(here.codes.cpu()[32:], there.codes[32:])
    if not double_quant:
        assert torch.equal(here.absmax.cpu(), there.absmax)
