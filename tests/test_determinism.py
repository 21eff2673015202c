"""PyTorch's switches for the same bits: thrown for the time of a run, and put back."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest
import torch

from halfbyte.run.determinism import CUBLAS, deterministic


def switches() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        os.environ.get(CUBLAS),
    )


@pytest.mark.parametrize("before", [None, ":16:8", ":4096:2"])
def test_the_switches_are_put_back(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CUBLAS, raising=False)
    if before is not None:
        monkeypatch.setenv(CUBLAS, before)
    there = switches()
    assert there == (False, False, True, before)
    with suppress(KeyError), deterministic(True):
        # cuBLAS knows two settings that give the same bits; what is one already stays.
        assert switches() == (True, False, False, ":16:8" if before == ":16:8" else ":4096:8")
        raise KeyError
    assert switches() == there
    with deterministic(False):
        assert switches() == there


def test_what_somebody_else_has_switched_on_stays_on() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for on in (True, False):
            with deterministic(on):
                assert torch.is_deterministic_algorithms_warn_only_enabled() is not on
            assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_on_a_gpu_what_has_no_ordered_kernel_is_an_error_and_attention_is_ordered() -> None:
    found = []
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, upstream = (
        torch.randn(1, 8, 1024, 64, device="cuda", dtype=torch.bfloat16, generator=generator)
        for _ in range(4)
    )
    with deterministic(True):
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.histc(torch.rand(8, device="cuda"))
        for _ in range(8):
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
            found.append(torch.autograd.grad(out, leaves, upstream))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
