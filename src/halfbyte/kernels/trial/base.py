"""What the trials of all kernels have in common: what they are given, and how they are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from halfbyte.kernels.choice import PLAIN, Kernel
from halfbyte.kernels.trial.spec import SETS, BatchShape, TrialSpec

# Shares of the largest value. The adapters' sums may be rounded to 16 bits on the way.
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.02, torch.float32: 0.002}
TOKENS = 67  # where their number changes nothing
# Beyond so many tokens no sum over a layer's width is split any more.
MOST_TOKENS = 16_640
_AT_ONCE = 1024  # rows compared


class WrongResultError(Exception):
    """A kernel that does not compute what its reference does."""


def compare(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise WrongResultError where the two are apart by more than this share of the largest."""
    if not expected.numel():
        return
    largest = expected.abs().max().item()
    for some, reference in zip(got.split(_AT_ONCE), expected.split(_AT_ONCE), strict=True):
        apart = (some.double() - reference.double()).abs().max().item()
        if not apart <= tolerance * largest:  # NaN is not
            raise WrongResultError(f"{what} is off by {apart:.3g}, the largest being {largest:.3g}")


class CaseBase:
    """Makes inputs on the spec's device; a subclass has a method for each kernel, of its name."""

    def __init__(self, spec: TrialSpec) -> None:
        self.spec = spec
        self.kernels = SETS[spec.kernels]
        self.device = torch.device(spec.device)
        self.dtype: torch.dtype = getattr(torch, spec.compute_dtype)
        self.stream: torch.dtype = getattr(torch, spec.stream_dtype)
        self._generator = torch.Generator(self.device).manual_seed(7)

    def widths(self, kind: str) -> list[int]:
        """Of the inputs of a kind of groups, the adapters' columns counted."""
        groups = (group for group in self.spec.groups if group.kind == kind)
        return list(dict.fromkeys(group.columns + group.extra for group in groups))

    def check(self, name: str, run: Callable[[Kernel], Sequence[Tensor]]) -> None:
        """``run`` with the kernel and with its reference must give the same."""
        expected = run(getattr(PLAIN, name))
        for got, value in zip(run(getattr(self.kernels, name)), expected, strict=True):
            compare(name, got, value, TOLERANCE[self.dtype])

    def random(self, *shape: int, dtype: torch.dtype | None = None, share: float = 1.0) -> Tensor:
        found = torch.randn(shape, generator=self._generator, device=self.device)
        return found.mul_(share).to(dtype or self.dtype)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """What nobody writes stays NaN, which passes no comparison."""
        return torch.full(shape, torch.nan, dtype=dtype or self.dtype, device=self.device)

    def empty_like(self, x: Tensor) -> Tensor:
        return torch.full_like(x, torch.nan)


def lengths(batches: Sequence[BatchShape]) -> list[int]:
    """The numbers of tokens that differ."""
    return list(dict.fromkeys(min(batch.tokens, MOST_TOKENS) for batch in batches))
