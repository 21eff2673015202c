"""Buckets: whatever the rows give fits one, and no choice of them would cost less."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.batching import Batches, make_batch
from halfbyte.plan.buckets import BatchSizes, Bucket, batch_sizes, choose_buckets


def made_rows(count: int, longest: int, seed: int) -> list[TokenizedRow]:
    generator = np.random.default_rng(seed)
    return [
        TokenizedRow(
            np.zeros(n, dtype=np.int32), generator.random(n) < generator.random(), row=number
        )
        for number, n in enumerate(generator.integers(2, longest + 1, count))
    ]


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 30),
    longest=st.integers(2, 300),
    size=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    steps=st.integers(1, 40),
    limit=st.sampled_from([3, 2000]),
    capture=st.floats(0.0, 3.0),
    most=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_every_batch_of_the_run_fits(
    count: int,
    longest: int,
    size: int,
    accumulation: int,
    steps: int,
    limit: int,
    capture: float,
    most: int,
    seed: int,
) -> None:
    rows = made_rows(count, longest, seed)
    sizes = batch_sizes(Batches(rows, size, accumulation, seed), steps, limit)
    buckets = choose_buckets(sizes, seconds_per_token=1e-3, capture_seconds=capture, most=most)
    assert buckets == choose_buckets(
        sizes, seconds_per_token=1e-3, capture_seconds=capture, most=most
    )
    assert 1 <= len(buckets) <= most
    assert buckets == sorted(set(buckets))
    batches = Batches(rows, size, accumulation, seed, buckets)
    for step in range(1, steps + 1):
        batches.step(step)
    by_length, by_labels = sorted(rows, key=len), sorted(rows, key=lambda row: row.num_labels)
    if steps > limit:  # not all steps were looked at: the worst that the rows could give fits
        for worst in (by_length, by_labels):
            batch = make_batch(worst[-size:])
            assert buckets[-1].holds(batch.num_tokens, batch.num_labels, batch.max_seqlen)
    for bucket in buckets:
        assert bucket.max_seqlen <= bucket.tokens
        assert bucket.labels <= bucket.tokens
    assert buckets[-1].tokens - sum(map(len, by_length[-size:])) < 64


@pytest.mark.parametrize("limit", [10, 2000])
def test_sizes_are_those_of_the_batches(limit: int) -> None:
    batches = Batches(made_rows(50, 60, seed=1), 4, 2, seed=3)
    sizes = batch_sizes(batches, 100, limit)
    made = [
        (batch.num_tokens, batch.num_labels, batch.max_seqlen)
        for step in range(1, 101)
        for batch in batches.step(step)
    ]
    assert (len(sizes.sampled) == len(made)) == (limit >= 100)
    assert sizes.each == max(1, 100 / limit)
    assert set(sizes.sampled) <= set(made)
    if limit >= 100:
        assert sizes.sampled == made


def seconds(
    buckets: list[int], tokens: list[int], each: float, per_token: float, capture: float
) -> float:
    """What a run costs, by a loop over its batches."""
    total = capture * len(buckets)
    for count in tokens:
        total += each * per_token * min(b for b in buckets if b >= count)
    return total


@settings(deadline=None, max_examples=150)
@given(
    tokens=st.lists(st.integers(1, 130), min_size=1, max_size=12),
    beyond=st.integers(0, 60),
    capture=st.sampled_from([0.0, 0.05, 0.3, 1.0, 10.0]),
    each=st.sampled_from([1.0, 7.5]),
    most=st.integers(1, 4),
)
def test_no_other_buckets_cost_less(
    tokens: list[int], beyond: int, capture: float, each: float, most: int
) -> None:
    largest = (max(tokens) + beyond,) * 3
    buckets = choose_buckets(
        BatchSizes([(n, n, n) for n in tokens], each, largest),
        seconds_per_token=1e-2,
        capture_seconds=capture,
        multiple=16,
        most=most,
    )
    last = -(-largest[0] // 64) * 64
    found = [bucket.tokens for bucket in buckets]
    assert found[-1] == last
    assert all(n % 16 == 0 for n in found)
    best = min(
        seconds([*some, last], tokens, each, 1e-2, capture)
        for count in range(most)
        for some in combinations(range(16, last, 16), count)
    )
    assert seconds(found, tokens, each, 1e-2, capture) <= best * (1 + 1e-9)


def test_buckets_follow_from_what_costs_more() -> None:
    sizes = BatchSizes([(n, n // 2, n // 4) for n in range(200, 1200, 10)], 1.0, (2000, 1500, 500))
    dear = choose_buckets(sizes, seconds_per_token=1e-5, capture_seconds=100.0)
    free = choose_buckets(sizes, seconds_per_token=1e-5, capture_seconds=0.0)
    assert dear == [Bucket(2048, 1536, 512)]
    assert [bucket.tokens for bucket in free] == [*range(256, 1281, 128), 2048]
    assert free[0] == Bucket(256, 128, 256)
    with pytest.raises(ValueError, match="at least one"):
        choose_buckets(sizes, seconds_per_token=1.0, capture_seconds=1.0, most=0)
