"""Adapters that start from the weight itself: PiSSA and LoftQ.

Both start A and B at the best approximation of rank r of some matrix M, s · B A ≈ M, each with the
roots of the singular values:

- PiSSA (Meng et al., 2024, arXiv 2404.02948): M is the weight. What is quantized and frozen is the
  rest, W - s B A, so that the adapter learns in the principal directions and 4 bits lose less.
- LoftQ (Li et al., 2023, arXiv 2310.08659), with one step and the codes of plain NF4, as PEFT's
  ``replace_lora_weights_loftq`` has it: M is what quantizing loses, W - dequant(quant(W)), and the
  base is the quantized one as ever. There the factor s is left out and has to be 1; here the
  product is right for any.

Each is made while its layer's weight is there to be quantized, so that the 16-bit model never
stands whole in memory. A singular value decomposition takes time: on one core 2.6 s for a matrix of
2,048 × 2,048. ``pissa_niter_16`` approximates it by 16 iterations on a random subspace (Halko et
al., 2011, arXiv 0909.4061, algorithm 4.4), in 0.13 s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.quant.nf4 import NF4Weight

Pair = tuple[Tensor, Tensor]  # A [r, in] and B [out, r], fp32
_NITER = "pissa_niter_"


class QuantizeHook(Protocol):
    """Has the say in how a layer's weight is quantized; ``quantize`` does it."""

    def __call__(
        self, name: str, weight: Tensor, quantize: Callable[[Tensor], NF4Weight]
    ) -> NF4Weight: ...


class LowRankStart:
    """A and B of each adapted layer, made of its weight as that is quantized.

    ``pairs`` has those made so far by the layer's name. ``known`` are the pairs that a run of PiSSA
    began with: what is quantized is then the same again.
    """

    def __init__(
        self,
        init: str,
        ranks: Mapping[str, int],
        scales: Mapping[str, float],
        seed: int,
        known: Mapping[str, Pair] | None = None,
    ) -> None:
        self.init, self.ranks, self.scales, self.seed = init, ranks, scales, seed
        self.pairs: dict[str, Pair] = {}
        self._known = known or {}
        self._numbers = {name: number for number, name in enumerate(ranks)}

    def __call__(
        self, name: str, weight: Tensor, quantize: Callable[[Tensor], NF4Weight]
    ) -> NF4Weight:
        """The weight to be frozen of the layer ``name``, whose original is ``weight`` [out, in]."""
        if name not in self.ranks:
            return quantize(weight)
        if self.init == "loftq":
            frozen = quantize(weight)
            self.pairs[name] = self._pair(name, weight.float() - frozen.dequantize(torch.float32))
            return frozen
        if name in self._known:
            a, b = (tensor.to(weight.device) for tensor in self._known[name])
        else:
            a, b = self._pair(name, weight.float())
        self.pairs[name] = a, b
        return quantize(weight.float() - self.scales[name] * (b @ a))

    def _pair(self, name: str, matrix: Tensor) -> Pair:
        rank = self.ranks[name]
        if self.init.startswith(_NITER):
            generator = torch.Generator().manual_seed(self.seed + self._numbers[name])
            iterations = int(self.init.removeprefix(_NITER))
            u, s, vh = randomized_svd(matrix, rank, iterations, generator)
        else:
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        root = (s[:rank] / self.scales[name]).sqrt()
        return (root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()


def randomized_svd(
    matrix: Tensor, rank: int, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``rank`` singular values and vectors of ``matrix`` [out, in], nearly.

    The subspace is begun from ``generator``, of the CPU, so that all devices begin alike.
    """
    q = torch.randn(matrix.shape[1], rank, generator=generator).to(matrix)
    q = torch.linalg.qr(matrix @ q).Q
    for _ in range(iterations):
        q = torch.linalg.qr(matrix.t() @ q).Q
        q = torch.linalg.qr(matrix @ q).Q
    u, s, vh = torch.linalg.svd(q.t() @ matrix, full_matrices=False)
    return q @ u, s, vh


def on_original(trained: Pair, initial: Pair) -> Pair:
    """An adapter of twice the rank that does to W what ``trained`` does to the rest of PiSSA.

    W - s B₀A₀ + s B A = W + s [B | -B₀] [A; A₀], as PEFT converts it.
    """
    (a, b), (a0, b0) = trained, initial
    return torch.cat([a, a0.to(a)]), torch.cat([b, -b0.to(b)], dim=1)


def of_residual(saved: Pair) -> tuple[Pair, Pair]:
    """(trained, initial) of what :func:`on_original` made."""
    a, b = saved
    rank = len(a) // 2
    return (a[:rank], b[:, :rank]), (a[rank:], -b[:, rank:])
