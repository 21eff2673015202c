"""Figures of two models on the same rows, each with its interval, and whether they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from halfbyte.evaluate.paired import Chance, mcnemar, sign_flip
from halfbyte.evaluate.resampling import Estimate, interval, resample
from halfbyte.evaluate.results import Figure, Wins


@dataclass(frozen=True)
class Measured:
    """One score of each row by base and adapter: ``base`` and ``adapter`` float64 [rows].

    A figure is Σ scores / Σ ``weights`` (1 for each row, if None; the same for both models).
    ``exponential`` figures are e to the power of that; ``right`` ones have scores of 0 and 1.
    """

    key: str
    name: str
    group: str
    base: np.ndarray
    adapter: np.ndarray
    weights: np.ndarray | None = None
    lower_is_better: bool = False
    kind: str = "share"
    exponential: bool = False
    right: bool = False


def compare(measured: Sequence[Measured], *, seed: int) -> list[Figure]:
    """The figures of ``measured``, which are all of the same rows.

    Intervals are of the BCa bootstrap over rows, those of the differences over the same resamples
    for both models. Of right and wrong answers McNemar's exact test says whether the models differ,
    of everything else the sign-flip test; of perplexity it is that of the loss, which it follows.
    """
    if not measured:
        return []
    ones = np.ones(len(measured[0].base))
    weights = [ones if m.weights is None else m.weights.astype(float) for m in measured]
    parts = [values.astype(float) for m in measured for values in (m.base, m.adapter)]
    ratios = resample(
        np.stack(parts, axis=1),
        np.stack([w for weight in weights for w in (weight, weight)], axis=1),
        seed=seed,
    )
    every = (ratios.values, ratios.resampled, ratios.without)
    figures = []
    for number, m in enumerate(measured):
        of_base, of_adapter = (
            [values[..., column] for values in every] for column in (2 * number, 2 * number + 1)
        )
        estimates = [_estimate(of_base), _estimate(of_adapter)]
        if m.exponential:
            estimates = [_exponential(one) for one in estimates]
            with np.errstate(over="ignore"):
                of_base, of_adapter = ([np.exp(v) for v in one] for one in (of_base, of_adapter))
        with np.errstate(invalid="ignore"):
            estimates.append(_estimate([b - a for a, b in zip(of_base, of_adapter, strict=True)]))
        figures.append(
            Figure(
                key=m.key,
                name=m.name,
                group=m.group,
                kind=m.kind,
                lower_is_better=m.lower_is_better,
                rows=len(ones),
                base=estimates[0],
                adapter=estimates[1],
                difference=estimates[2],
                chance=_chance(m, seed),
            )
        )
    return figures


def _estimate(of: Sequence[np.ndarray]) -> Estimate:
    value, resampled, without = of
    return interval(float(value), resampled, without)


def _exponential(one: Estimate) -> Estimate:
    """e to the power of a figure and of the ends of its interval."""
    value, low, high = (
        None if x is None else float(np.exp(min(x, 700.0))) for x in (one.value, one.low, one.high)
    )
    assert value is not None
    return Estimate(value, low, high)


def _chance(m: Measured, seed: int) -> Chance:
    if m.right:
        return mcnemar(m.base > 0.5, m.adapter > 0.5)
    return sign_flip(m.adapter.astype(float) - m.base, seed=seed)


def count_wins(m: Measured, name: str) -> Wins:
    """In how many rows each model is ahead by the score of ``m`` itself, by more than rounding."""
    scale = m.base if m.weights is None else m.weights
    ahead = (m.adapter - m.base).astype(float) * (-1.0 if m.lower_is_better else 1.0)
    ahead[np.abs(ahead) <= 1e-9 * np.maximum(1.0, np.abs(scale))] = 0.0
    return Wins(
        m.key, name, int((ahead > 0).sum()), int((ahead < 0).sum()), int((ahead == 0).sum())
    )
