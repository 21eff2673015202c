"""Which shapes the batches of a run are padded to.

A captured step exists once for each shape, and each capture costs time, while every token of
padding costs time in every step that has it. The fewest seconds in all are found by dynamic
programming over the borders between buckets, from the lengths of the batches that the run will
make: they follow from the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from halfbyte.data.batch import Bucket
from halfbyte.data.batching import Batches
from halfbyte.data.fitted import sizes_of

__all__ = ["BatchSizes", "Bucket", "batch_sizes", "choose_buckets"]

# Label counts, longest rows and the largest bucket are rounded up to this many tokens.
ROUNDED_TO = 64

Size = tuple[int, int, int]  # tokens, labels, tokens of the longest row


@dataclass(frozen=True)
class BatchSizes:
    """How large the micro-batches of a run are."""

    sampled: Sequence[Size]  # all of them, or those of some of the steps
    each: float  # micro-batches of the run that one of ``sampled`` stands for
    largest: Size  # no micro-batch of the run has more of any of the three


def batch_sizes(batches: Batches, steps: int, limit: int = 2000) -> BatchSizes:
    """The sizes of the micro-batches of steps 1 … ``steps``.

    Of a longer run than ``limit`` steps, so many are taken, evenly spread, and the largest is the
    largest that the rows could give; of packs, which are never over their length, the largest that
    there is. No batch is made: a million rows take about a second.
    """
    lengths, labels = sizes_of(batches.rows)
    chosen = sorted(set(np.linspace(1, steps, min(steps, limit)).round().astype(int).tolist()))
    sampled = [
        (int(lengths[at].sum()), int(labels[at].sum()), int(lengths[at].max()))
        for step in chosen
        for at in batches.positions(step)
    ]
    if steps <= limit:
        tokens, labelled, longest = zip(*sampled, strict=True)
        return BatchSizes(sampled, 1.0, (max(tokens), max(labelled), max(longest)))
    if batches.packs is not None:
        largest = _largest_of_packs(batches, steps, lengths, labels)
        return BatchSizes(sampled, steps / len(chosen), largest)
    size = batches.batch_size
    largest = (
        int(np.sort(lengths)[-size:].sum()),
        int(np.sort(labels)[-size:].sum()),
        int(lengths.max()),
    )
    return BatchSizes(sampled, steps / len(chosen), largest)


def _largest_of_packs(
    batches: Batches, steps: int, lengths: np.ndarray, labels: np.ndarray
) -> Size:
    """The largest sizes of all micro-batches of the epochs that the run begins.

    All are looked at, since the fullest packs are of no use as a bound for their labels.
    """
    tokens = labelled = 0
    for number in range(-(-steps // batches.steps_per_epoch)):
        order, borders = batches.epoch(number)
        tokens = max(tokens, int(np.add.reduceat(lengths[order], borders[:-1]).max()))
        labelled = max(labelled, int(np.add.reduceat(labels[order], borders[:-1]).max()))
    return tokens, labelled, int(lengths.max())


def choose_buckets(
    sizes: BatchSizes,
    *,
    seconds_per_token: float,
    capture_seconds: float,
    multiple: int = 128,
    most: int = 12,
) -> list[Bucket]:
    """The buckets, at most ``most``, with which the run is expected to end soonest.

    A micro-batch costs ``seconds_per_token`` for each position of its bucket (what it costs
    whatever its size changes no choice), and a bucket costs ``capture_seconds``. A batch falls
    into the first bucket that holds its tokens, its labels and its longest row. The last bucket
    holds every batch of the run, sampled or not.

    The tokens of the last bucket are those of the largest batch rounded up to 64, those of the
    others multiples of ``multiple``. A bucket's labels are the most of the sampled batches in it,
    rounded up to 64; its longest row is the longest of the data that fits.

    A pure function, so that a resumed run has the same buckets. Raises ValueError for ``most``
    under 1.
    """
    if most < 1:
        raise ValueError(f"at least one bucket is needed, not {most}")
    tokens = np.array([size[0] for size in sizes.sampled], dtype=np.int64)
    last = _rounded(sizes.largest[0], ROUNDED_TO)
    # Of all multiples only the next above some batch can be best: a border between two of them
    # moves down to the lower one, holds the same batches and pads them less.
    borders = np.unique(np.append(np.minimum(-(-tokens // multiple) * multiple, last), last))
    chosen = _cheapest(
        borders,
        np.bincount(np.searchsorted(borders, tokens), minlength=len(borders)),
        seconds_per_token * sizes.each,
        capture_seconds,
        most,
    )
    buckets = []
    for below, top in zip([0, *chosen[:-1]], chosen, strict=True):
        found = [size[1] for size in sizes.sampled if below < size[0] <= top]
        labels = sizes.largest[1] if top == last else max(found)
        buckets.append(
            Bucket(
                tokens=top,
                labels=min(top, _rounded(labels, ROUNDED_TO)),
                max_seqlen=min(top, _rounded(sizes.largest[2], ROUNDED_TO)),
            )
        )
    return buckets


def _cheapest(
    borders: np.ndarray, counts: np.ndarray, per_token: float, capture: float, most: int
) -> list[int]:
    """Those of the ascending ``borders``, the last among them, whose buckets cost least.

    ``counts[j]`` batches lie above border j - 1 and not above border j.
    """
    total = np.concatenate([[0], np.cumsum(counts)])  # batches up to and with border j - 1
    costs = np.full((most + 1, len(borders) + 1), np.inf)  # of k buckets up to border j - 1
    costs[0, 0] = 0.0
    before = np.zeros((most + 1, len(borders) + 1), dtype=np.int64)
    for k in range(1, most + 1):
        for j in range(1, len(borders) + 1):
            inside = total[j] - total[:j]  # batches of a bucket that begins after each border
            ways = costs[k - 1, :j] + inside * per_token * borders[j - 1] + capture
            before[k, j] = ways.argmin()
            costs[k, j] = ways[before[k, j]]
    chosen: list[int] = []
    k, j = int(costs[:, -1].argmin()), len(borders)  # the fewest of those that cost the same
    while j:
        chosen.append(int(borders[j - 1]))
        k, j = k - 1, int(before[k, j])
    return chosen[::-1]


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
