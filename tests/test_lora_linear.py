"""The QLoRA product, against PEFT's layer on bitsandbytes' and against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

import bitsandbytes
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.bnb import Linear4bit

from halfbyte.kernels.dropout import dropout_key, keep_mask
from halfbyte.quant.linear import DropoutPosition, QLoRALinear
from halfbyte.quant.nf4 import quantize_nf4

IN, OUT, R, ALPHA, TOKENS = 128, 192, 8, 16, 37
P = 0.25


def values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "weight": (OUT, IN),
        "bias": (OUT,),
        "lora_A": (R, IN),
        "lora_B": (OUT, R),
        "x": (TOKENS, IN),
        "upstream": (TOKENS, OUT),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def our_layer(v: dict[str, Tensor], bias: bool, p: float, dtype: torch.dtype) -> QLoRALinear:
    layer = QLoRALinear.from_weight(
        quantize_nf4(v["weight"], double_quant=False),
        v["bias"].to(dtype) if bias else None,
        IN,
        OUT,
        dtype,
    )
    layer.lora_A, layer.lora_B = nn.Parameter(v["lora_A"]), nn.Parameter(v["lora_B"])
    layer.scale, layer.dropout_p, layer.number = ALPHA / R, p, 3
    layer.position = DropoutPosition(seed=9)
    layer.position.step, layer.position.micro_batch = 5, 1
    return layer.train()


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
        if "lora_" in name:
            found["lora_A" if "lora_A" in name else "lora_B"] = parameter.grad
    return found


def plain(v: dict[str, Tensor], weight: Tensor, bias: bool, mask: Tensor) -> dict[str, Tensor]:
    """Equation 3 of the paper in fp64 through autograd."""
    leaves = {n: v[n].double().requires_grad_() for n in ("x", "lora_A", "lora_B")}
    dropped = leaves["x"] * mask.double() / (1.0 - (P if not mask.all() else 0.0))
    y = leaves["x"] @ weight.double().t()
    y = y + ALPHA / R * (dropped @ leaves["lora_A"].t()) @ leaves["lora_B"].t()
    if bias:
        y = y + v["bias"].double()
    (y * v["upstream"].double()).sum().backward()
    return {"y": y.detach()} | {n: t.grad for n, t in leaves.items()}


def assert_near(ours: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert ours.keys() == expected.keys()
    for name, want in expected.items():
        error = (ours[name].double() - want.double()).norm() / want.double().norm()
        assert error < bound, f"{name}: {error:.2e}"


def mask_of(p: float) -> Tensor:
    if p == 0.0:
        return torch.ones(TOKENS, IN, dtype=torch.bool)
    mask = keep_mask((TOKENS, IN), p, dropout_key(9, 5, 1, 3), torch.device("cpu"))
    assert 0 < mask.count_nonzero() < mask.numel()
    return mask


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_it_is_pefts_layer(p: float, bias: bool, dense: bool) -> None:
    v = values()
    ours = our_layer(v, bias, p, torch.float32)
    if dense:
        assert ours.keep_dense() == 4 * IN * OUT
    base = bitsandbytes.nn.Linear4bit(
        IN,
        OUT,
        bias=bias,
        compute_dtype=torch.float32,
        compress_statistics=False,
        quant_type="nf4",
    )
    state = {"weight": v["weight"]} | ({"bias": v["bias"]} if bias else {})
    base.load_state_dict(state)
    peft = Linear4bit(
        base.to("cpu"),
        "default",
        LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=p),
        r=R,
        lora_alpha=ALPHA,
    )
    peft.lora_A["default"].weight.data = v["lora_A"].clone()
    peft.lora_B["default"].weight.data = v["lora_B"].clone()
    if p > 0.0:
        peft.lora_dropout["default"] = Mask(mask_of(p), p)
    assert_near(run(ours, v, torch.float32), run(peft.train(), v, torch.float32), 1e-6)


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    # In 16 bits x, A, B, u and y are each rounded: a few times the type's epsilon.
    [(torch.float32, 1e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)],
    ids=str,
)
def test_it_is_the_equation(p: float, dtype: torch.dtype, bound: float) -> None:
    v = values()
    ours = our_layer(v, True, p, dtype)
    expected = plain(v, ours.base.dequantize(torch.float32), True, mask_of(p))
    found = run(ours, v, torch.float32)
    assert found["y"].dtype == dtype
    assert found["x"].dtype == found["lora_A"].dtype == found["lora_B"].dtype == torch.float32
    assert_near(found, expected, bound)


def test_switched_off_it_is_the_base_and_still_hands_gradients_down() -> None:
    v = values()
    ours = our_layer(v, True, P, torch.float32)
    ours.adapter_enabled = False
    x = v["x"].clone().requires_grad_()
    y = ours(x)
    weight = ours.weight_dense()
    assert torch.equal(y, nn.functional.linear(v["x"], weight, v["bias"]))
    y.backward(v["upstream"])
    torch.testing.assert_close(x.grad, v["upstream"] @ weight)
    assert ours.lora_A.grad is None


def test_dropout_ends_with_training() -> None:
    v = values()
    ours = our_layer(v, True, P, torch.float32)
    trained = ours(v["x"])
    assert torch.equal(trained, ours(v["x"]))  # the place names the mask
    plain_layer = our_layer(v, True, 0.0, torch.float32)
    assert not torch.equal(trained, plain_layer(v["x"]))
    assert torch.equal(ours.eval()(v["x"]), plain_layer(v["x"]))
