"""Whether two models differ on the same rows, or might do so by chance.

Both tests ask: if it did not matter which of the two models gave which of a row's two results, how
often would the results be as far apart as they are? They assume nothing of how results are
distributed, and that rows are independent of each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np

FLIPS = 10_000
# A difference that chance gives less often than this is called real.
REAL = 0.05
# Of so few rows that differ, all ways to swap them are looked at.
_ALL_WAYS = 13
_FLIPPED_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Chance:
    """How likely a difference at least as large is by chance alone, and which test says so."""

    p: float
    test: str

    @property
    def real(self) -> bool:
        return self.p < REAL

    @property
    def words(self) -> str:
        """``the difference is real (p = 0.003)``, ``may be chance (p = 0.41)``."""
        p = p_text(self.p)
        return f"the difference is real ({p})" if self.real else f"may be chance ({p})"


def p_text(p: float) -> str:
    """``p < 0.001``, ``p = 0.041``, ``p = 0.41``; never rounded to the border it does not reach."""
    if p < 0.001:
        return "p < 0.001"
    digits = 3 if p < 0.1 else 2
    return f"p = {p:.{digits}f}" if f"{p:.{digits}f}" != f"{REAL:.3f}" else f"p = {p:.4f}"


def sign_flip(differences: np.ndarray, *, seed: int, flips: int = FLIPS) -> Chance:
    """The paired permutation test of Σ ``differences`` (float64 [rows]), two-sided.

    If the models do not differ, a row's difference has either sign with the same probability
    (Fisher, 1935, "The Design of Experiments", section 21). Of few rows all signs are tried, which
    is exact; of more ``flips`` random ones, where the observed signs count as one of them (Phipson
    and Smyth, 2010, arXiv 1603.05766), so that p is never 0. A ratio of sums with the same weights
    for both models, such as a loss by tokens, is a constant times that sum.
    """
    d = differences[differences != 0]
    if not len(d):
        return Chance(1.0, "sign flips, all")
    # Sums of the same numbers in another order may differ in their last digits.
    observed = abs(float(d.sum())) - 1e-12 * float(np.abs(d).sum())
    if len(d) <= _ALL_WAYS:
        ways = np.arange(2 ** len(d))
        signs = 1.0 - 2.0 * ((ways[:, None] >> np.arange(len(d))) & 1)
        return Chance(float(np.mean(np.abs(signs @ d) >= observed)), "sign flips, all")
    rng = np.random.default_rng(seed)
    as_far = 0
    at_once = max(1, _FLIPPED_AT_ONCE // len(d))
    for begin in range(0, flips, at_once):
        shape = (min(at_once, flips - begin), len(d))
        signs = 1.0 - 2.0 * rng.integers(0, 2, size=shape, dtype=np.int8)
        as_far += int(np.count_nonzero(np.abs(signs @ d) >= observed))
    return Chance((as_far + 1) / (flips + 1), f"{flips:,} random sign flips")


def mcnemar(one: np.ndarray, other: np.ndarray) -> Chance:
    """The exact test of McNemar of two models that are each right or wrong, bool [rows] each.

    Only rows on which they disagree say anything, and by chance each model is right in half of them
    (McNemar, 1947, Psychometrika 12; the exact form is the two-sided binomial test).
    """
    first = int(np.count_nonzero(one & ~other))
    second = int(np.count_nonzero(other & ~one))
    rows = first + second
    at_most = sum(comb(rows, k) for k in range(min(first, second) + 1))
    # Whole numbers divided as such: 2 to the power of some thousand rows is no float.
    return Chance(min(1.0, 2 * at_most / 2**rows) if rows else 1.0, "exact McNemar")
