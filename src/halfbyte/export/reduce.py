"""An adapter of a lower rank: of B·A the part that a few singular values are.

By Eckart and Young (1936) no other matrix of rank k is nearer to s · B A, of r ranks, in the sum of
squares than its first k singular values with their vectors, and what is lost is the rest of them:

    ‖s B A - B' A'‖ / ‖s B A‖ = √(Σ_{i>k} σ_i² / Σ_i σ_i²)

The product [out, in] is not formed. With B = Q_B R_B and Aᵀ = Q_A R_A its singular values are those
of R_B R_Aᵀ [r, r], and its vectors those of that matrix, turned by Q_B and Q_A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.model.lora_init import Pair


@dataclass(frozen=True)
class Factors:
    """``pair`` A [k, in] and B [out, k], fp32, with B A near to what was asked for.

    ``error`` is the relative error in the Frobenius norm, ``size`` the norm of what was asked for.
    """

    pair: Pair
    error: float
    size: float

    @property
    def rank(self) -> int:
        return len(self.pair[0])


@torch.no_grad()
def reduced(
    a: Tensor, b: Tensor, scale: float, *, rank: int | None = None, energy: float | None = None
) -> Factors:
    """The best approximation of scale · B A, with A [r, in] and B [out, r].

    Of ``rank`` at most, or of as few ranks as keep the share ``energy`` of the squares of its
    singular values. Its own factor is 1. Computed in fp64.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().t())
    u, values, vh = torch.linalg.svd(scale * (r_b @ r_a.t()), full_matrices=False)
    squares = values.square()
    total = float(squares.sum())
    # Behind this the values are the arithmetic's own.
    real = int((values > len(values) * 2.0**-52 * values[0]).sum()) if total > 0.0 else 1
    kept = min(real, rank) if rank is not None else real
    if energy is not None and total > 0.0:
        enough = squares.cumsum(0) >= energy * total * (1.0 - 2.0**-40)
        kept = min(kept, int(enough.int().argmax()) + 1)
    kept = max(kept, 1)
    lost = float(squares[kept:].sum())
    root = values[:kept].sqrt()
    first = (root[:, None] * (vh[:kept] @ q_a.t())).float().contiguous()
    second = ((q_b @ u[:, :kept]) * root).float().contiguous()
    error = (lost / total) ** 0.5 if total > 0.0 else 0.0
    return Factors((first, second), error, total**0.5)


@dataclass(frozen=True)
class Errors:
    """Relative errors in the Frobenius norm: the largest with its layer, the mean over the layers,
    and that of all layers taken as one vector."""

    largest: float
    layer: str
    mean: float
    whole: float


def errors_of(layers: Mapping[str, Factors]) -> Errors:
    """Of all ``layers`` by their names."""
    worst = max(layers, key=lambda name: layers[name].error)
    lost = sum((one.error * one.size) ** 2 for one in layers.values())
    total = sum(one.size**2 for one in layers.values())
    return Errors(
        largest=layers[worst].error,
        layer=worst,
        mean=sum(one.error for one in layers.values()) / len(layers),
        whole=(lost / total) ** 0.5 if total > 0.0 else 0.0,
    )
