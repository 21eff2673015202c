"""Dropout masks: their rate, that no two are related, and that each can be made again."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from halfbyte.kernels.dropout import dropout, dropout_key, keep_mask

CPU = torch.device("cpu")
N = 1 << 20


def mask(p: float, *place: int, shape: tuple[int, ...] = (N,)) -> Tensor:
    return keep_mask(shape, p, dropout_key(*place), CPU)


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.5, 0.9])
def test_the_rate_is_p_everywhere(p: float) -> None:
    """Over all elements, in each column, in each row, and in each half of a hash."""
    kept = mask(p, 42, 1, 0, 0, shape=(1024, 1024)).double()
    deviation = (p * (1 - p)) ** 0.5
    # Five standard deviations: one of 2,000 sums would pass it by chance once in 900 tests.
    for sums, count in (
        (kept.mean(), N),
        (kept.mean(dim=0), 1024),
        (kept.mean(dim=1), 1024),
        (kept.view(-1, 2).mean(dim=0), N // 2),
    ):
        assert ((sums - (1 - p)).abs().max() < 5 * deviation / count**0.5).item()


def correlation(a: Tensor, b: Tensor, p: float) -> float:
    """In standard deviations of what independent masks would give."""
    a, b = a.double() - (1 - p), b.double() - (1 - p)
    return abs((a * b).mean().item()) / (p * (1 - p)) * a.numel() ** 0.5


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_masks_of_two_places_are_independent(p: float) -> None:
    places = [(42, 1, 0, 0), (42, 1, 0, 1), (42, 1, 0, 2), (42, 1, 1, 0), (42, 2, 0, 0)]
    places += [(43, 1, 0, 0), (42, 0, 1, 0), (0, 1, 0, 42), (42, 1 << 20, 0, 0)]
    masks = [mask(p, *place) for place in places]
    for (one, a), (other, b) in itertools.combinations(zip(places, masks, strict=True), 2):
        assert correlation(a, b, p) < 5, (one, other)
        assert correlation(a[1:], b[:-1], p) < 5, (one, other)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_elements_of_one_mask_are_independent(p: float) -> None:
    kept = mask(p, 42, 7, 3, 11)
    for lag in (1, 2, 3, 64, 256, 576, 1024, 2048, 4096, 1 << 16):
        assert correlation(kept[lag:], kept[:-lag], p) < 5, lag


def test_a_mask_is_a_function_of_its_place() -> None:
    a = mask(0.1, 42, 1, 0, 5, shape=(37, 53))
    torch.rand(100)  # no generator is involved
    assert torch.equal(a, mask(0.1, 42, 1, 0, 5, shape=(37, 53)))
    # Of an odd number of elements too, and whatever the shape.
    assert torch.equal(a.view(-1), mask(0.1, 42, 1, 0, 5, shape=(37 * 53,)))
    keys = {
        dropout_key(*place) for place in itertools.product((0, 1, 42), range(30), (0, 1), range(30))
    }
    assert len(keys) == 3 * 30 * 2 * 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_scaled(dtype: torch.dtype) -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    key = dropout_key(1, 2, 3, 4)
    kept = keep_mask((64, 64), 0.2, key, CPU)
    out = dropout(x, 0.2, key)
    assert out.dtype == dtype
    torch.testing.assert_close(out[kept], x[kept] * 1.25)
    assert not out[~kept].any()


@pytest.mark.gpu
def test_a_gpu_makes_the_same_mask() -> None:
    key = dropout_key(42, 1, 0, 0)
    assert torch.equal(
        keep_mask((N,), 0.05, key, torch.device("cuda")).cpu(), keep_mask((N,), 0.05, key, CPU)
    )
