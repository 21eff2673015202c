"""How sure a figure is: confidence intervals by resampling the rows.

A figure is a ratio of sums over rows, Σ parts / Σ weights: of a loss the parts are each row's sum
of losses and the weights its tokens, of a mean over rows the weights are 1. Rows are what was drawn
when data was held out, and tokens of a row depend on one another, so that rows are resampled, each
with all of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
# Row numbers drawn at a time: 32 MB of them.
_DRAWN_AT_ONCE = 4_000_000
# Sums of the same numbers in another order differ by less than this share.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Ratios:
    """Some ratios of sums over the same ``n`` rows.

    ``values`` float64 [k] of the rows as they are; ``resampled`` float64 [resamples, k] of as many
    rows drawn with replacement; ``without`` float64 [n, k] of all rows but one.
    """

    values: np.ndarray
    resampled: np.ndarray
    without: np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A figure and the interval it is in with 95 % confidence.

    ``low`` and ``high`` are None where resampling can say nothing: of one row, and where all rows
    are alike.
    """

    value: float
    low: float | None
    high: float | None


def resample(
    parts: np.ndarray, weights: np.ndarray, *, seed: int, resamples: int = RESAMPLES
) -> Ratios:
    """The ratios of ``parts`` to ``weights``, both float64 [n, k], weights over 0.

    All columns meet the same resamples, so that differences between columns are paired. Raises
    ValueError where there is no row or a weight is not over 0.
    """
    rows = len(parts)
    if not rows or not (weights > 0).all():
        raise ValueError("there is no row, or one without weight")
    rng = np.random.default_rng(seed)
    found = np.empty((resamples, parts.shape[1]))
    at_once = max(1, _DRAWN_AT_ONCE // rows)
    for begin in range(0, resamples, at_once):
        count = min(at_once, resamples - begin)
        drawn = rng.integers(0, rows, size=(count, rows))
        drawn += rows * np.arange(count)[:, None]
        # How often each row is in each resample, so that sums are products of matrices.
        times = (
            np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows).astype(float)
        )
        found[begin : begin + count] = (times @ parts) / (times @ weights)
    total, weight = parts.sum(axis=0), weights.sum(axis=0)
    without = np.empty((0, parts.shape[1]))
    if rows > 1:
        without = (total - parts) / (weight - weights)
    return Ratios(total / weight, found, without)


def interval(value: float, resampled: np.ndarray, without: np.ndarray) -> Estimate:
    """``value`` with its bias-corrected and accelerated (BCa) bootstrap interval.

    ``resampled`` float64 [resamples] are the figure's values on resampled rows, ``without`` float64
    [n] those on all rows but one (Efron, 1987, "Better Bootstrap Confidence Intervals", Journal of
    the American Statistical Association 82, equations 2.3 and 6.6). The percentiles are shifted for
    a figure whose distribution leans to one side, as that of a loss does.
    """
    rows = len(without)
    if rows < 2 or not np.isfinite(resampled).all() or _alike(resampled):
        return Estimate(value, None, None)
    normal = NormalDist()
    # The resamples that give the very value count half, of which accuracies have many.
    close = _ROUNDING * abs(value)
    below = (np.mean(resampled < value - close) + np.mean(resampled <= value + close)) / 2
    tail = (1 - LEVEL) / 2
    ends = [tail, 1 - tail]
    if 0 < below < 1:
        shift = normal.inv_cdf(float(below))
        influence = (rows - 1) * (without.mean() - without)
        spread = float((influence**2).sum())
        skew = float((influence**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
        ends = [_corrected(end, shift, skew) for end in ends]
    low, high = np.quantile(resampled, ends)
    return Estimate(value, float(low), float(high))


def _corrected(share: float, shift: float, skew: float) -> float:
    """The percentile to take for ``share`` (Efron's equation 2.3)."""
    normal = NormalDist()
    z = shift + normal.inv_cdf(share)
    return normal.cdf(shift + z / (1 - skew * z))


def _alike(values: np.ndarray) -> bool:
    """Whether the values differ by no more than the rounding of their sums."""
    largest = float(np.abs(values).max())
    return float(values.max() - values.min()) <= _ROUNDING * max(largest, 1e-300)
