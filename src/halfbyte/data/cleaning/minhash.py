"""Which texts may be alike: MinHash signatures, and bands of them that are equal (LSH).

Broder, 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3. The signatures
are datasketch's. Its index of bands would keep 3.7 KB of each row in Python objects, and with its
own choice of bands it finds half of the pairs that just reach a threshold of 0.85; here the bands
are columns of numbers that are sorted, about 200 bytes of each row, and chosen to find 99 %.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from halfbyte.errors import DataError

PERMUTATIONS = 128
RECALL = 0.99  # of the pairs whose similarity is the threshold
CHUNK = 1000  # texts whose signatures are in memory at once
AT_ONCE = 20_000  # word sequences of one text that are hashed at once
LONGEST_BAND = 32
SCHEME = "affine32"  # of datasketch's signatures: 32-bit words
MIX = np.uint64(0x9E3779B97F4A7C15)

NEEDS = (
    "the filter near_duplicates needs the package datasketch; install it with "
    "pip install 'halfbyte[clean]'."
)


def bands_for(threshold: float) -> tuple[int, int]:
    """Number of bands and values in one: the longest with which ``RECALL`` is reached.

    Two texts of the similarity s have a band in common by a chance of 1 - (1 - s^length)^bands.
    """
    for length in range(LONGEST_BAND, 1, -1):
        bands = PERMUTATIONS // length
        if 1 - (1 - threshold**length) ** bands >= RECALL:
            return bands, length
    return PERMUTATIONS, 1


def check_datasketch() -> None:
    """Raises DataError where the library is missing."""
    try:
        import datasketch  # noqa: F401
    except ImportError:
        raise DataError(NEEDS) from None


def band_keys(shingles: Iterable[list[bytes]], texts: int, threshold: float) -> np.ndarray:
    """uint64 [bands, texts]: texts with an equal key in a row of it may be alike.

    ``shingles`` are those of each of so many ``texts``; one without any gets the key 0 everywhere.
    """
    from datasketch import MinHash

    bands, length = bands_for(threshold)
    sketch = MinHash(PERMUTATIONS, hashfunc=zlib.crc32, scheme=SCHEME)
    # In one array: so many chunks, and what joins them, would take the memory twice.
    keys = np.empty((bands, texts), dtype=np.uint64)
    begin = 0
    for chunk in _chunks(shingles):
        signatures = np.empty((len(chunk), PERMUTATIONS), dtype=np.uint64)
        for row, words in zip(signatures, chunk, strict=True):
            sketch.clear()
            for first in range(0, len(words), AT_ONCE):  # each takes 128 words of memory
                sketch.update_batch(words[first : first + AT_ONCE])
            row[:] = sketch.hashvalues
        joined = _joined(signatures[:, : bands * length].reshape(len(chunk), bands, length))
        joined[[not words for words in chunk]] = 0
        keys[:, begin : begin + len(chunk)] = joined.T
        begin += len(chunk)
    return keys


def groups_of(keys: np.ndarray) -> np.ndarray:
    """int32 [texts, bands]: the number of the group of texts with the same key, -1 if alone.

    ``keys`` as ``band_keys`` gives them. No two bands have a number in common.
    """
    bands, texts = keys.shape
    groups = np.full((texts, bands), -1, dtype=np.int32)
    begin = 0
    for band, column in enumerate(keys):
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        same = (ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)
        alike = np.zeros(texts, dtype=bool)
        alike[1:] |= same
        alike[:-1] |= same
        opens = alike.copy()
        opens[1:] &= ~same
        groups[order[alike], band] = np.cumsum(opens)[alike] - 1 + begin
        begin += int(opens.sum())
    return groups


def _joined(values: np.ndarray) -> np.ndarray:
    """uint64 [texts, bands] out of [texts, bands, length]: a hash of each band's values."""
    joined = np.zeros(values.shape[:2], dtype=np.uint64)
    for position in range(values.shape[2]):
        joined = (joined ^ values[:, :, position]) * MIX
        joined ^= joined >> np.uint64(29)
    return joined


def _chunks(items: Iterable[list[bytes]]) -> Iterator[list[list[bytes]]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk
