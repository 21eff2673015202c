"""How far the logits of two models lie from each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_AT_ONCE = 128  # positions: with 150,000 tokens, 150 MB for each fp64 tensor of them
_SHOWN_BYTES, _LEAST_SHOWN = 256 << 20, 64


@dataclass(frozen=True)
class Agreement:
    """Over ``positions`` places of text, each with a logit for every token.

    ``largest`` and ``mean`` are of the logits' absolute differences, ``kl`` is the mean of
    KL(theirs ‖ ours) in nats, ``top1`` the share of places with the same most likely token.
    """

    positions: int
    largest: float
    mean: float
    kl: float
    top1: float


def tokens_to_show(vocabulary: int) -> int:
    """As many tokens as have 256 MB of fp32 logits, and never fewer than 64."""
    return max(_LEAST_SHOWN, _SHOWN_BYTES // (4 * vocabulary))


@torch.no_grad()
def compare_logits(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> Agreement:
    """Compare logits [T, vocabulary] of the same texts, of any floating types and devices.

    What is not finite on either side makes ``largest``, ``mean`` and ``kl`` not finite, and its
    place counts as one where the tokens differ. Raises ValueError where shapes or numbers of texts
    differ, or where there is no place at all.
    """
    positions = same = 0
    largest = total = kl = 0.0
    vocabulary = 1
    for one, other in zip(ours, theirs, strict=True):
        if one.shape != other.shape or one.dim() != 2:
            raise ValueError(f"logits {list(one.shape)} and {list(other.shape)} of one text")
        vocabulary = one.shape[1]
        for a, b in zip(one.split(_AT_ONCE), other.split(_AT_ONCE), strict=True):
            p, q = b.double().cpu(), a.double().cpu()
            apart = (p - q).abs()
            largest = _larger(largest, float(apart.max()))
            total += float(apart.sum())
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum())
            same += int(((p.argmax(-1) == q.argmax(-1)) & apart.isfinite().all(-1)).sum())
            positions += len(apart)
    if positions == 0:
        raise ValueError("no logits to compare")
    # Rounding makes a sum of zeros a little negative.
    kl = kl if kl > 0.0 or kl != kl else 0.0
    return Agreement(
        positions, largest, total / positions / vocabulary, kl / positions, same / positions
    )


def _larger(a: float, b: float) -> float:
    return b if b > a or b != b else a
