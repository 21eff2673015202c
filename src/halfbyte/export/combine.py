"""Several adapters of one base model made one, layer by layer.

Each adapter i does D_i = s_i B_i A_i to a layer's weight. Where it has no adapter of the layer, D_i
is zero.

- ``linear``: Σ w_i D_i, which is exact: B's and A's stand side by side, and the ranks add up.
- ``ties`` (Yadav et al., 2023, arXiv 2306.01708, algorithm 1): of each D_i the share ``density`` of
  largest magnitude is kept; of each weight the sign with more magnitude behind it is elected, and
  the mean of those w_i D_i taken that have it.
- ``dare_linear``, ``dare_ties`` (Yu et al., 2024, arXiv 2311.03099, section 3): of each D_i a share
  ``density`` is kept by chance and divided by it, so that the expectation stays; then they are
  added, or the sign is elected and the mean taken as above.

All but the first make a matrix of full rank, of which the first ``rank`` singular values are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from halfbyte.export.reduce import Factors, reduced
from halfbyte.model.lora_init import Pair, randomized_svd

Method = Literal["linear", "ties", "dare_linear", "dare_ties"]
# Larger ones are decomposed by 16 iterations on a random subspace, of which these ranks more than
# asked for make the last ones as good as the first.
_EXACT, _MORE, _ITERATIONS = 1024, 16, 16


@torch.no_grad()
def combine_layer(
    parts: Sequence[tuple[Pair, float] | None],
    weights: Sequence[float],
    *,
    method: Method,
    density: float = 0.5,
    rank: int | None = None,
    generator: torch.Generator | None = None,
) -> Factors:
    """One layer of the combination, of which the factor is 1.

    ``parts`` are A [r, in] and B [out, r] of each adapter with its factor, None where it has none
    of this layer; ``generator``, of the CPU, is drawn from for DARE. ``rank`` is by
    default the sum of theirs. Raises ValueError for no part at all.
    """
    there = [(part, w) for part, w in zip(parts, weights, strict=True) if part is not None]
    if not there:
        raise ValueError("no adapter has the layer")
    if method == "linear":
        a = torch.cat([pair[0].float() for (pair, _), _ in there])
        b = torch.cat([w * scale * pair[1].float() for (pair, scale), w in there], dim=1)
        if rank is not None and rank < len(a):
            return reduced(a, b, 1.0, rank=rank)
        return Factors((a, b), 0.0, reduced(a, b, 1.0).size)
    deltas = torch.stack([scale * (b.float() @ a.float()) for ((a, b), scale), _ in there])
    factors = torch.tensor([w for _, w in there]).view(-1, 1, 1)
    if method == "ties":
        deltas = torch.stack([keep_largest(delta, density) for delta in deltas])
    else:
        deltas = torch.stack([delta * dare_mask(delta, density, generator) for delta in deltas])
    mixed = (
        (deltas * factors).sum(0) if method == "dare_linear" else mean_of_elected(deltas, factors)
    )
    return low_rank(mixed, rank or sum(len(pair[0]) for (pair, _), _ in there))


def keep_largest(delta: Tensor, density: float) -> Tensor:
    """``delta`` with zeros but for its share ``density`` of largest magnitude."""
    kept = int(density * delta.numel())
    found = torch.zeros_like(delta).view(-1)
    at = delta.abs().view(-1).topk(kept, sorted=False).indices
    found[at] = delta.view(-1)[at]
    return found.view_as(delta)


def dare_mask(delta: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """1 / density with the probability ``density``, else zero; in the shape of ``delta``."""
    return torch.empty_like(delta).bernoulli_(density, generator=generator) / density


def mean_of_elected(deltas: Tensor, factors: Tensor) -> Tensor:
    """[out, in] of ``deltas`` [n, out, in]: the mean of those with the elected sign, zeros not
    counted, each times its factor (``factors`` [n, 1, 1])."""
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agrees = deltas.sign() == sign
    return (deltas * factors * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def low_rank(matrix: Tensor, rank: int) -> Factors:
    """``matrix`` [out, in], fp32, by its first ``rank`` singular values."""
    size = float(matrix.norm())
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= _EXACT:
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        wider = min(rank + _MORE, *matrix.shape)
        u, values, vh = randomized_svd(matrix, wider, _ITERATIONS, generator)
    root = values[:rank].sqrt()
    a, b = (root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()
    # As it is, and not by the values that were left out: the subspace is found nearly.
    error = float((matrix - b @ a).norm()) / size if size > 0.0 else 0.0
    return Factors((a, b), error, size)
