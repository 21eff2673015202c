"""Intervals and tests of an evaluation, against scipy, exact enumeration and simulated rows."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import scipy.stats

from halfbyte.evaluate import resampling
from halfbyte.evaluate.comparison import Measured, compare, count_wins
from halfbyte.evaluate.paired import Chance, mcnemar, sign_flip
from halfbyte.evaluate.resampling import Estimate, interval, resample


def rows_of(kind: str, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Parts and weights: losses that lean to one side, or right and wrong.

    They are whole numbers, so that sums are equal in whatever order they are made.
    """
    draw = np.random.default_rng(seed)
    weights = draw.integers(3, 90, rows).astype(float)
    if kind == "right":
        return (draw.random(rows) < 0.2).astype(float), np.ones(rows)
    return np.round(draw.gamma(0.7, 2.0, rows) * weights), weights


def estimate(parts: np.ndarray, weights: np.ndarray, seed: int, **settings: Any) -> Estimate:
    found = resample(parts[:, None], weights[:, None], seed=seed, **settings)
    return interval(float(found.values[0]), found.resampled[:, 0], found.without[:, 0])


@pytest.mark.parametrize("kind", ["loss", "right"])
@pytest.mark.parametrize("rows", [2, 7, 60])
def test_intervals_are_scipys(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, weights = rows_of(kind, rows, seed=rows + 1)
    if kind == "right":
        parts[:2] = 0, 1
    # Drawn in small pieces the rows are the same, from the same generator as scipy's.
    monkeypatch.setattr(resampling, "_DRAWN_AT_ONCE", 1000)
    ours = estimate(parts, weights, seed=5)

    def ratio(one: np.ndarray, other: np.ndarray, axis: int = -1) -> Any:
        return one.sum(axis) / other.sum(axis)

    theirs = scipy.stats.bootstrap(
        (parts, weights),
        ratio,
        paired=True,
        n_resamples=resampling.RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert ours.value == pytest.approx(parts.sum() / weights.sum(), rel=1e-12)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-9)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth() -> None:
    """Rows from a known distribution: Σ loss / Σ tokens over all rows there could be is 1.4."""
    held = 0
    for seed in range(300):
        parts, weights = rows_of("loss", 60, seed=1000 + seed)
        found = estimate(parts, weights, seed=seed, resamples=1000)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 1.4 <= found.high
    assert 0.90 <= held / 300 <= 0.98


def test_no_interval_where_resampling_says_nothing() -> None:
    one = estimate(np.array([3.0]), np.array([2.0]), seed=0)
    assert one == Estimate(1.5, None, None)
    weights = np.array([2.0, 7.0, 10.0])
    alike = estimate(0.1 * weights, weights, seed=0)
    assert (alike.low, alike.high) == (None, None)
    with pytest.raises(ValueError, match="no row"):
        resample(np.empty((0, 1)), np.empty((0, 1)), seed=0)


def test_few_rows_have_all_their_signs_flipped() -> None:
    draw = np.random.default_rng(3)
    for rows in (2, 4, 9, 13):
        differences = draw.normal(0.5, 1.0, rows)
        ours = sign_flip(differences, seed=0)

        def total(values: np.ndarray, axis: int = -1) -> Any:
            return values.sum(axis)

        theirs = scipy.stats.permutation_test(
            (differences,), total, permutation_type="samples", n_resamples=np.inf
        )
        assert ours.p == pytest.approx(theirs.pvalue, rel=1e-12)
    # Rows that are equal are no reason to believe in a difference, nor against it.
    assert sign_flip(np.zeros(50), seed=0).p == 1.0
    padded = np.concatenate([differences, np.zeros(50)])
    assert sign_flip(padded, seed=0).p == ours.p


def test_many_rows_have_random_signs_flipped() -> None:
    draw = np.random.default_rng(8)
    for shift in (0.0, 0.3, 0.8):
        differences = draw.normal(shift, 1.0, 16)
        every = np.array(list(product((1.0, -1.0), repeat=16))) @ differences
        exact = float(np.mean(np.abs(every) >= abs(differences.sum()) - 1e-12))
        ours = sign_flip(differences, seed=1)
        # Four standard errors of 10,000 flips.
        assert ours.p == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 10_000) ** 0.5 + 2e-4)
        assert ours == sign_flip(differences, seed=1)
    assert sign_flip(np.full(200, 1.0), seed=0).p == pytest.approx(1 / 10_001)


def test_a_test_without_a_difference_is_seldom_sure() -> None:
    draw = np.random.default_rng(0)
    p = np.array([sign_flip(draw.standard_t(2, 24), seed=seed, flips=999).p for seed in range(400)])
    for level in (0.05, 0.2, 0.5):
        assert np.mean(p <= level) == pytest.approx(level, abs=4 * (level / 400) ** 0.5)


def test_right_and_wrong_are_tested_exactly() -> None:
    draw = np.random.default_rng(2)
    for rows in (1, 6, 40, 900, 5000):
        one, other = draw.random(rows) < 0.5, draw.random(rows) < 0.56
        first, second = int((one & ~other).sum()), int((other & ~one).sum())
        expected = 1.0
        if first + second:
            expected = scipy.stats.binomtest(first, first + second).pvalue
        assert mcnemar(one, other).p == pytest.approx(expected, rel=1e-9)


def test_figures_of_two_models_are_paired() -> None:
    """A difference that each row has is sure, however much the rows differ from one another."""
    draw = np.random.default_rng(4)
    tokens = draw.integers(5, 50, 40)
    base = draw.gamma(1.0, 3.0, 40) * tokens
    adapter = base - 0.2 * tokens + draw.normal(0, 0.01, 40) * tokens
    loss = Measured(
        "loss", "loss", "answer_tokens", base, adapter, tokens, lower_is_better=True, kind="loss"
    )
    perplexity = Measured(
        "perplexity",
        "perplexity",
        "answer_tokens",
        base,
        adapter,
        tokens,
        lower_is_better=True,
        kind="factor",
        exponential=True,
    )
    right = Measured(
        "right", "right", "answers", (base < 20) * 1.0, (adapter < 20) * 1.0, right=True
    )
    first, second, third = compare([loss, perplexity, right], seed=9)

    def width(one: Estimate) -> float:
        assert one.low is not None
        assert one.high is not None
        return one.high - one.low

    assert first.difference.value == pytest.approx(-0.2, abs=0.01)
    assert width(first.difference) < 0.02 < 0.5 < width(first.base)
    assert first.chance.p < 0.001
    assert first.better
    # e to the power of the loss, and of the ends of its interval.
    for one, other in ((first.base, second.base), (first.adapter, second.adapter)):
        assert other.value == pytest.approx(np.exp(one.value))
        assert other.low == pytest.approx(np.exp(one.low))
        assert other.high == pytest.approx(np.exp(one.high))
    assert second.chance == first.chance
    assert third.chance.test == "exact McNemar"
    assert compare([loss, perplexity, right], seed=9) == [first, second, third]

    wins = count_wins(loss, "lower loss")
    better = int((adapter < base).sum())
    assert (wins.adapter, wins.base, wins.ties) == (better, 40 - better, 0)
    tied = Measured(
        "chrf", "chrF2", "answers", np.array([0.1, 0.5, 0.9]), np.array([0.1, 0.6, 0.2])
    )
    assert (
        count_wins(tied, "").ties == count_wins(tied, "").base == count_wins(tied, "").adapter == 1
    )


@pytest.mark.parametrize(
    ("p", "words"),
    [
        (0.00001, "the difference is real (p < 0.001)"),
        (0.0312, "the difference is real (p = 0.031)"),
        (0.0499, "the difference is real (p = 0.0499)"),
        (0.05, "may be chance (p = 0.0500)"),
        (0.062, "may be chance (p = 0.062)"),
        (0.406, "may be chance (p = 0.41)"),
        (1.0, "may be chance (p = 1.00)"),
    ],
)
def test_what_chance_is_called(p: float, words: str) -> None:
    assert Chance(p, "").words == words
