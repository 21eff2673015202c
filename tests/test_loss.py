"""The chunked cross-entropy, against torch's in fp64."""

from __future__ import annotations

import pytest
import torch

from halfbyte.kernels import loss
from halfbyte.kernels.loss import cross_entropy_sum

TOKENS, HIDDEN, VOCAB = 50, 24, 97


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels[torch.rand(TOKENS, generator=generator) < 0.4] = -100
    labels[3], labels[4] = 0, VOCAB - 1
    return hidden, weight, labels


@pytest.mark.parametrize("scale", [1.0, 0.125, 8.0])
@pytest.mark.parametrize("softcap", [None, 5.0, 30.0])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_loss_and_gradient(
    scale: float, softcap: float | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * VOCAB * rows)
    hidden, weight, labels = inputs()
    h = hidden.clone().requires_grad_()
    number = int((labels != -100).sum())
    ours = cross_entropy_sum(h, weight, labels, number, scale=scale, softcap=softcap)
    (ours * 0.37).backward()

    d = hidden.double().requires_grad_()
    z = (d @ weight.double().t()) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    expected = torch.nn.functional.cross_entropy(z, labels, reduction="sum")
    (expected * 0.37).backward()

    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=0)
    error = (h.grad.double() - d.grad).norm() / d.grad.norm()
    assert error < 2e-6
    assert not h.grad[labels == -100].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_16_bits_keep_the_softmax_in_32(dtype: torch.dtype) -> None:
    hidden, weight, labels = inputs()
    hidden, weight = hidden.to(dtype), (weight / 64).to(dtype)
    h = hidden.float().requires_grad_()
    ours = cross_entropy_sum(h, weight, labels, int((labels != -100).sum()))
    assert ours.dtype == torch.float32
    # fp16 does not hold the first scale of a loss, but it does hold these gradients times it.
    (ours * 2.0**16).backward()
    d = hidden.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(d @ weight.double().t(), labels, reduction="sum")
    expected.backward()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), expected, rtol=4 * eps, atol=0)
    error = (h.grad.double() / 2.0**16 - d.grad).norm() / d.grad.norm()
    assert error < 4 * eps


def test_large_logits_and_no_labels() -> None:
    hidden, weight, labels = inputs()
    ours = cross_entropy_sum(hidden * 1e4, weight, labels, int((labels != -100).sum()))
    expected = torch.nn.functional.cross_entropy(
        (hidden * 1e4).double() @ weight.double().t(), labels, reduction="sum"
    )
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=0)
    h = hidden.clone().requires_grad_()
    none = cross_entropy_sum(h, weight, torch.full_like(labels, -100), 0)
    none.backward()
    assert none == 0.0
    assert not h.grad.any()
