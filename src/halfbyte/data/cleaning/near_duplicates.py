"""Rows that are nearly the same as an earlier one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from halfbyte.data.cleaning.duplicates import digest, name_of
from halfbyte.data.cleaning.minhash import band_keys, check_datasketch, groups_of
from halfbyte.data.cleaning.parts import Verdict, framed_part, shown_part
from halfbyte.data.cleaning.words import normalized
from halfbyte.data.example import Example
from halfbyte.recipe.cleaning import NearDuplicates

# What bounds the time where many rows are alike and few are near enough, as rows made from one
# mould: of a group the first so many that stay, and of a row's candidates the likeliest.
KEPT_OF_A_GROUP = 128
COMPARED = 32
SETS_HELD = 4096  # word sequences of so many rows are held, since some are compared again and again


def near_duplicates(settings: NearDuplicates, examples: Sequence[Example]) -> Iterator[Verdict]:
    """The first of rows that are alike stays.

    Candidates are found by MinHash; a row is dropped only if the similarity of the two sets of
    word sequences themselves reaches the threshold, so that none is dropped in error, and a pair
    that just reaches it is missed by a chance of 1 %. The time is linear in the rows. Raises
    DataError where datasketch is missing.
    """
    check_datasketch()

    def shingles(index: int) -> list[bytes]:
        frame, text = framed_part(examples[index], settings.by)
        return shingles_of(text, settings.ngram, frame)

    count = len(examples)
    groups = groups_of(band_keys(map(shingles, range(count)), count, settings.threshold))
    sequences = lru_cache(SETS_HELD)(lambda index: frozenset(shingles(index)))
    members = _Members(groups)
    alone = np.asarray((groups < 0).all(axis=1))
    for index, example in enumerate(examples):
        if alone[index]:
            yield None
            continue
        own = groups[index][groups[index] >= 0].tolist()
        common = Counter(other for group in own for other in members.of(group))
        likeliest = (other for other, _ in common.most_common(COMPARED))
        found = _nearest(index, likeliest, sequences, settings.threshold)
        if found is None:
            for group in own:
                members.add(group, index)
            yield None
        else:
            other, similarity = found
            shown = shown_part(example, settings.by)
            # Rounded down: what is shown never exceeds what it is.
            share = np.floor(similarity * 100) / 100
            yield f"{share:.2f} like {name_of(examples[other], example)}: {shown}"


class _Members:
    """Of each group the rows that stay, the first KEPT_OF_A_GROUP of them.

    They lie in one array with a place for each that may come: a million rows of which each is like
    another one are in some ten million groups, which as lists would take gigabytes.
    """

    def __init__(self, groups: np.ndarray) -> None:
        """``groups`` int32 [rows, bands] as ``groups_of`` gives them."""
        sizes = np.bincount(groups[groups >= 0])
        room = np.minimum(sizes, KEPT_OF_A_GROUP)
        self._starts = np.cumsum(room) - room
        self._counts = np.zeros(len(room), dtype=np.int32)
        self._rows = np.empty(int(room.sum()), dtype=np.int32)

    def of(self, group: int) -> list[int]:
        start = self._starts[group]
        rows: list[int] = self._rows[start : start + self._counts[group]].tolist()
        return rows

    def add(self, group: int, row: int) -> None:
        count = self._counts[group]
        if count < KEPT_OF_A_GROUP:
            self._rows[self._starts[group] + count] = row
            self._counts[group] = count + 1


def _nearest(
    index: int,
    others: Iterable[int],
    sequences: Callable[[int], frozenset[bytes]],
    threshold: float,
) -> tuple[int, float] | None:
    """The first of ``others`` whose similarity reaches ``threshold``, and that similarity."""
    mine = sequences(index)
    for other in others:
        similarity = jaccard(mine, sequences(other))
        if similarity >= threshold:
            return other, similarity
    return None


def shingles_of(text: str, ngram: int, frame: str = "") -> list[bytes]:
    """The sequences of ``ngram`` words in ``text``, in UTF-8; all of it where it has fewer.

    Each begins with a digest of ``frame``, so that texts of different frames have none in common.
    """
    words = normalized(text).encode("utf-8", "surrogatepass").split(b" ")
    if len(words) <= ngram:
        sequences = [b" ".join(words)] if words[0] else []
    else:
        sequences = list(map(b" ".join, zip(*(words[i:] for i in range(ngram)), strict=False)))
    if not frame:
        return sequences
    start = digest(normalized(frame))
    return [start + sequence for sequence in sequences]


def jaccard(one: frozenset[bytes], other: frozenset[bytes]) -> float:
    """The share of what is in either that is in both."""
    both = len(one & other)
    return both / (len(one) + len(other) - both)
