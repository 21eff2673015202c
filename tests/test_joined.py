"""Layers joined into one product with their adapters folded in, against fp64 and PEFT's order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbyte.kernels.choice import ALL, ELEMENTWISE, PLAIN, Kernels
from halfbyte.kernels.dropout import dropout_key, keep_mask
from halfbyte.kernels.lora_group import make_fold
from halfbyte.quant.joined import FlatAdapter, JoinedLinear, Scratch
from halfbyte.quant.linear import QLoRALinear
from halfbyte.quant.nf4 import NF4Memory, quantize_nf4

R, SCALE, P = 16, 2.0, 0.1
SMALL = (33, 128, (64, 32, 32))  # tokens, columns, rows of each layer
QKV, GATE_UP = (513, 2048, (2048, 256, 256)), (513, 2048, (5632, 5632))  # TinyLlama's
WHERE = [
    pytest.param("cpu", PLAIN, SMALL, id="cpu"),
    *(
        pytest.param("cuda", kernels, shape, id=f"cuda-{name}-{label}", marks=pytest.mark.gpu)
        for name, kernels in (("all", ALL), ("elementwise", ELEMENTWISE))
        for label, shape in (("qkv", QKV), ("gate-up", GATE_UP))
    ),
]


def layers_of(
    columns: int, rows: tuple[int, ...], dtype: torch.dtype, device: str, double: bool
) -> list[QLoRALinear]:
    generator = torch.Generator().manual_seed(0)
    layers = []
    for number, out in enumerate(rows):
        weight = torch.randn(out, columns, generator=generator) * 0.02
        base = quantize_nf4(weight.to(device), double_quant=double)
        layer = QLoRALinear.from_weight(base, None, columns, out, dtype)
        a = torch.randn(R, columns, generator=generator) * columns**-0.5
        b = torch.randn(out, R, generator=generator) * 0.02
        layer.lora_A = torch.nn.Parameter(a.to(device))
        layer.lora_B = torch.nn.Parameter(b.to(device))
        layer.scale, layer.dropout_p, layer.number = SCALE, P, number
        layers.append(layer)
    return layers


def join(layers: list[QLoRALinear], kernels: Kernels, keep: bool) -> JoinedLinear:
    """``layers`` as one, trained from memory of its own."""
    joined = JoinedLinear(layers, kernels)
    parts: list[Tensor] = []
    offsets, at = {}, 0
    for layer in layers:
        assert layer.lora_A is not None
        assert layer.lora_B is not None
        offsets[layer] = at, at + layer.lora_A.numel()
        parts += [layer.lora_A.detach().flatten(), layer.lora_B.detach().flatten()]
        at += layer.lora_A.numel() + layer.lora_B.numel()
    values = torch.cat(parts)
    if keep:
        joined.keep()
    else:
        joined.use_scratch(Scratch(joined.rows, joined.width, joined.dtype, joined.device))
    joined.attach(
        FlatAdapter(values, torch.zeros_like(values), values.to(joined.dtype, copy=True), offsets)
    )
    if keep:
        assert joined.group is not None
        assert joined.kept is not None
        kernels.fold_b(make_fold([(joined.group, joined.kept)]))
    return joined


def in_ulps(found: Tensor, exact: Tensor) -> Tensor:
    """The error of bf16 values in units of their last place.

    Where terms cancel, of the last place of the tensor's usual size: no sum of rounded terms can be
    nearer than they are.
    """
    usual = exact.square().mean().sqrt()
    place = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=usual))) - 7)
    return (found.double() - exact).abs() / place


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_codes_that_lie_end_to_end_are_not_copied(double: bool) -> None:
    """And give the same weight as codes that are brought together."""
    columns, rows = 128, (256, 128, 128)  # a scale of scales is of one layer
    layers = layers_of(columns, rows, torch.bfloat16, "cpu", double)
    memory = NF4Memory([columns * n for n in rows], 64, double, "cpu")
    together = []
    for layer in layers_of(columns, rows, torch.bfloat16, "cpu", double):
        weight = layer.base.dequantize(torch.float32)
        layer.base = quantize_nf4(weight, double_quant=double, memory=memory)
        together.append(layer)
    apart = [
        QLoRALinear.from_weight(
            quantize_nf4(layer.base.dequantize(torch.float32), double_quant=double),
            None, columns, layer.out_features, torch.bfloat16,
        )
        for layer in layers
    ]  # fmt: skip
    first = together[0].base.codes.data_ptr()
    joined, expected = join(together, PLAIN, keep=True), JoinedLinear(apart, PLAIN)
    assert together[0].base.codes.data_ptr() == first
    assert together[1].base.codes.data_ptr() == first + 256 * columns // 2
    assert apart[1].base.codes.data_ptr() == apart[0].base.codes.data_ptr() + 256 * columns // 2
    expected.keep()
    assert joined.kept is not None
    assert expected.kept is not None
    assert torch.equal(joined.kept[:, :columns], expected.kept[:, :columns])


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "from NF4"])
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize(("device", "kernels", "shape"), WHERE)
def test_outputs_are_nearer_to_fp64_than_pefts(
    device: str,
    kernels: Kernels,
    shape: tuple[int, int, tuple[int, ...]],
    double: bool,
    keep: bool,
) -> None:
    tokens, columns, rows = shape
    c = torch.bfloat16
    layers = layers_of(columns, rows, c, device, double)
    joined = join(layers, kernels, keep)
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(tokens, columns, generator=generator).to(device, c)
    keys = [dropout_key(3, 1, 0, module) for module in range(len(rows))]
    masks = [keep_mask((tokens, columns), P, key, torch.device(device)) for key in keys]
    x = torch.full((tokens, joined.width), torch.nan, dtype=c, device=device)
    x[:, :columns] = value
    kernels.lora_down(x, joined.group, torch.tensor(keys, dtype=torch.int32, device=device))
    found = joined.product(x)
    assert found.dtype == c

    start = 0
    for layer, mask in zip(layers, masks, strict=True):
        weight = layer.base.dequantize(c)
        a, b = layer.lora_A.detach(), layer.lora_B.detach()
        dropped = value.double() * mask / (1 - P)
        exact = value.double() @ weight.double().t()
        exact += SCALE * (dropped @ a.double().t()) @ b.double().t()
        # PEFT under autocast: base and both products of the adapter rounded, then scaled and added.
        theirs = (value * mask / (1 - P)).to(c) @ a.to(c).t() @ b.to(c).t() * SCALE
        theirs = torch.nn.functional.linear(value, weight) + theirs
        mine = in_ulps(found[:, start : start + layer.out_features], exact)
        peft = in_ulps(theirs, exact)
        print(
            f"ulp: {mine.max():.2f}, rms {mine.square().mean().sqrt():.3f}; "
            f"PEFT {peft.max():.2f}, rms {peft.square().mean().sqrt():.3f}"
        )
        assert mine.max() <= 2.0
        assert mine.square().mean() <= peft.square().mean()
        start += layer.out_features


def test_joined_scales_stay_with_their_matrix() -> None:
    """Double quantization shares scales among 256 blocks: joined where none spans two matrices."""
    for rows, pieces in (((256, 128, 64), 1), ((128, 256, 64), 1), ((64, 128), 2)):
        layers = layers_of(128, rows, torch.float32, "cpu", double=True)
        before = [layer.base.dequantize(torch.float32) for layer in layers]
        joined = join(layers, PLAIN, keep=True)
        assert len(joined._pieces) == pieces
        assert joined.kept is not None
        assert torch.equal(joined.kept[:, :128], torch.cat(before))
        for layer, weight in zip(layers, before, strict=True):
            assert torch.equal(layer.base.dequantize(torch.float32), weight)
