"""From logits to the next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import ModelError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the defaults take the likeliest.

    ``temperature`` divides the logits (0 is greedy); ``top_k`` keeps the k likeliest (0 keeps
    all); ``top_p`` the fewest of those whose probabilities add up to p (Holtzman et al., 2019,
    arXiv 1904.09751); ``repetition_penalty`` divides the positive logits of tokens that stand in
    the prompt or the answer and multiplies the negative ones (Keskar et al., 2019, arXiv
    1909.05858, section 4.1). The order is transformers': penalty, temperature, top k, top p.

    Raises ValueError for a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} is not 0 or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p {self.top_p} is not over 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is not 0 or more")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty {self.repetition_penalty} is not over 0")

    @property
    def is_argmax(self) -> bool:
        """The likeliest token of the bare logits is taken."""
        return self.temperature == 0.0 and self.repetition_penalty == 1.0


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """``logits`` [V] with those of the token ids ``seen`` int64 [n] made less likely."""
    at = logits[seen]  # an id seen twice is written twice, with the same number
    return logits.index_copy(0, seen, torch.where(at > 0, at / penalty, at * penalty))


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that is drawn from, fp32 [V], for ``logits`` fp32 [V]; not for greedy."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[0]:
        smallest = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if sampling.top_p < 1.0:
        ascending, order = logits.sort()
        below = ascending.softmax(dim=0).cumsum(dim=0) <= 1.0 - sampling.top_p
        below[-1] = False  # the likeliest stays
        logits = logits.index_fill(0, order[below], float("-inf"))
    return logits.softmax(dim=0)


def next_token(
    logits: Tensor, seen: Tensor, sampling: Sampling, generator: torch.Generator
) -> Tensor:
    """The next token of one row, int64 scalar, for its ``logits`` [V] of any floating type.

    ``seen`` int64 [n] are the row's tokens so far, prompt and answer. Raises ModelError where
    there is no distribution to draw from.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1.0:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        return logits.argmax()
    if logits.isnan().any():
        raise ModelError(
            "the model's logits are not numbers, so no token can be drawn; its adapter or its base "
            "is broken, or overflows in this precision."
        )
    return torch.multinomial(probabilities(logits, sampling), 1, generator=generator)[0]
