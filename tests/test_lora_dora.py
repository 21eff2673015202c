"""The product with DoRA, against PEFT's layer on bitsandbytes' and against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

import bitsandbytes
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.bnb import Linear4bit

from halfbyte.kernels.dora_linear import adapted_norms, row_squares
from halfbyte.kernels.dropout import (
    apply_dropout_reference,
    dropout_key,
    dropout_keys_reference,
    keep_mask,
)
from halfbyte.model.host_reads import HostReads
from halfbyte.quant.linear import DropoutPosition, QLoRALinear
from halfbyte.quant.nf4 import quantize_nf4

IN, OUT, R, ALPHA, TOKENS, P = 128, 192, 8, 16, 37, 0.25
SEED, STEP, MICRO_BATCH, MODULE = 9, 5, 1, 3
TRAINED = ("lora_A", "lora_B", "lora_magnitude_vector")


def values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "weight": (OUT, IN),
        "bias": (OUT,),
        "lora_A": (R, IN),
        "lora_B": (OUT, R),
        "x": (TOKENS, IN),
        "upstream": (TOKENS, OUT),
        "change": (OUT,),
    }
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    found["lora_A"] *= 0.2
    found["lora_B"] *= 0.2
    return found


def our_layer(v: dict[str, Tensor], bias: bool, p: float, dtype: torch.dtype) -> QLoRALinear:
    layer = QLoRALinear.from_weight(
        quantize_nf4(v["weight"], double_quant=False),
        v["bias"].to(dtype) if bias else None,
        IN,
        OUT,
        dtype,
    )
    layer.lora_A, layer.lora_B = nn.Parameter(v["lora_A"]), nn.Parameter(v["lora_B"])
    layer.scale, layer.dropout_p, layer.number = ALPHA / R, p, MODULE
    layer.position = DropoutPosition(seed=SEED)
    layer.position.step, layer.position.micro_batch = STEP, MICRO_BATCH
    layer.use_dora()
    return layer.train()


@torch.no_grad()
def move(magnitude: nn.Parameter, v: dict[str, Tensor]) -> None:
    magnitude.mul_(1.0 + 0.1 * v["change"])


class Mask(nn.Module):
    """Dropout with a mask that is given."""

    def __init__(self, mask: Tensor, p: float) -> None:
        super().__init__()
        self.mask, self.p = mask, p

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask / (1.0 - self.p)


def run(layer: nn.Module, v: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    x = v["x"].to(dtype).requires_grad_()
    y = layer(x)
    (y * v["upstream"].to(y.dtype)).sum().backward()
    found = {"y": y.detach(), "x": x.grad}
    for name, parameter in layer.named_parameters():
        for kind in TRAINED:
            if kind in name:
                found[kind] = parameter.grad
    return found


def assert_near(ours: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert ours.keys() == expected.keys() == {"x", "y", *TRAINED}
    for name, want in expected.items():
        error = (ours[name].double() - want.double()).norm() / want.double().norm()
        assert error < bound, f"{name}: {error:.2e}"


def mask_of(p: float) -> Tensor:
    if p == 0.0:
        return torch.ones(TOKENS, IN, dtype=torch.bool)
    key = dropout_key(SEED, STEP, MICRO_BATCH, MODULE)
    return keep_mask((TOKENS, IN), p, key, torch.device("cpu"))


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("on_device", [False, True], ids=["host keys", "device keys"])
def test_it_is_pefts_layer(p: float, bias: bool, on_device: bool) -> None:
    v = values()
    ours = our_layer(v, bias, p, torch.float32)
    if on_device:  # as a captured step has the masks: made where they are needed
        at = ours.position
        assert at is not None
        at.keys = torch.zeros(MODULE + 1, 2, dtype=torch.int32)
        dropout_keys_reference(SEED, torch.tensor([STEP, MICRO_BATCH]), at.keys)
        at.apply = apply_dropout_reference
    base = bitsandbytes.nn.Linear4bit(
        *(IN, OUT),
        bias=bias,
        compute_dtype=torch.float32,
        compress_statistics=False,
        quant_type="nf4",
    )
    base.load_state_dict({"weight": v["weight"]} | ({"bias": v["bias"]} if bias else {}))
    config = LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=p, use_dora=True)
    peft = Linear4bit(base.to("cpu"), "default", config, r=R, lora_alpha=ALPHA)
    peft.lora_A["default"].weight.data = v["lora_A"].clone()
    peft.lora_B["default"].weight.data = v["lora_B"].clone()
    # PEFT's magnitudes are those of B = 0; ours of what A and B are when it begins.
    theirs = peft.lora_magnitude_vector["default"]
    theirs.update_layer(
        base_layer=peft.get_base_layer(),
        lora_A=v["lora_A"],
        lora_B=v["lora_B"],
        scaling=ALPHA / R,
    )
    assert ours.lora_magnitude_vector is not None
    torch.testing.assert_close(ours.lora_magnitude_vector, theirs.weight, rtol=1e-6, atol=0)
    for magnitude in (ours.lora_magnitude_vector, theirs.weight):
        move(magnitude, v)
    if p > 0.0:
        peft.lora_dropout["default"] = Mask(mask_of(p), p)
    assert_near(run(ours, v, torch.float32), run(peft.train(), v, torch.float32), 1e-6)


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)]
)
def test_it_is_the_equation(p: float, dtype: torch.dtype, bound: float) -> None:
    v = values()
    ours = our_layer(v, True, p, dtype)
    assert ours.lora_magnitude_vector is not None
    move(ours.lora_magnitude_vector, v)
    w = ours.base.dequantize(dtype).double()
    leaves = {n: v[n].double().requires_grad_() for n in ("x", "lora_A", "lora_B")}
    magnitude = ours.lora_magnitude_vector.detach().double().requires_grad_()
    z = leaves["x"] * mask_of(p).double() / (1.0 - p)
    delta = ALPHA / R * leaves["lora_B"] @ leaves["lora_A"]
    m = magnitude / (w + delta).norm(dim=1).detach()
    y = leaves["x"] @ w.t() - z @ w.t() + m * (z @ (w + delta).t()) + v["bias"].double()
    (y * v["upstream"].double()).sum().backward()
    expected = {"y": y.detach(), "lora_magnitude_vector": magnitude.grad}
    expected |= {n: t.grad for n, t in leaves.items()}
    found = run(ours, v, torch.float32)
    assert found["y"].dtype == dtype
    assert_near(found, expected, bound)


def test_magnitudes_are_not_rounded_to_what_16_bits_have_near_1() -> None:
    v = values()
    layer = our_layer(v, False, 0.0, torch.bfloat16)
    before = layer(v["x"]).float()
    assert layer.lora_magnitude_vector is not None
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(1.006)
    assert torch.tensor(1.006, dtype=torch.bfloat16) == 1.0078125
    share = (layer(v["x"]).float() / before - 1.0).mean().item()
    assert share == pytest.approx(6e-3, rel=0.05)


def test_norms_are_those_of_the_sum_and_nothing_is_read_by_the_host() -> None:
    v = values()
    w = v["weight"].bfloat16()
    found = adapted_norms(w, row_squares(w), v["lora_A"], v["lora_B"], 0.7)
    expected = (w.double() + 0.7 * v["lora_B"].double() @ v["lora_A"].double()).norm(dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)
    layer = our_layer(v, True, P, torch.float32)
    at = layer.position
    assert at is not None
    at.keys, at.apply = torch.zeros(4, 2, dtype=torch.int32), apply_dropout_reference
    with HostReads() as reads:
        layer(v["x"].requires_grad_()).sum().backward()
    assert reads.found == []
