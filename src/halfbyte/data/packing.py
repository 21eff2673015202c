"""Rows put into packs of a fixed length, anew in each epoch, the number of packs always the same.

Rows go one after another into the pack that they leave the least room in, and into a new one where
none has room for them (best fit). In which order decides two things. From the longest to the
shortest (best-fit decreasing) hardly a token is left free, but rows of like length come to lie
together, so that one step learns long answers and another short ones. In a random order the packs
are as mixed as rows drawn by chance, at one or two packs more in a hundred. So best-fit decreasing
says how few packs will do, and the order taken is the most random one that needs at most
``PACKS_MORE`` more.

What is made so is not a packing of rows but of places, each as long as a row: which row lies in
which place is drawn anew in each epoch, among the places long enough for it. A place drawn by
chance in each pack has what the pack leaves free on top, so that a row may also take the place of a
somewhat longer or shorter one. The number of packs, and with it the number of steps in an epoch,
therefore follows from the lengths and the seed, and holds for all epochs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Packs more than best-fit decreasing needs, as a share, that a well mixed order may cost.
PACKS_MORE = 0.01
# Rows are sorted by their length times exp(spread · z), z normal, longest first: infinity is an
# order by chance alone, 0 is best-fit decreasing.
SPREADS = (math.inf, 1.0, 0.5, 0.25)
# Epochs whose rows are kept: as long as a run is planned, the same few are asked for repeatedly.
EPOCHS_KEPT = 4
# Packs of so many rows are filled well, and two of them are a step of 16 rows; so long are packs
# made for it where the recipe leaves their length open.
ROWS_PER_PACK = 8
LONG_ENOUGH = 2048
BLOCK_BITS = 9
IN_BLOCK = (1 << BLOCK_BITS) - 1


@dataclass(frozen=True)
class PackedEpoch:
    """The rows of one epoch, pack after pack.

    ``order`` int64 [rows] holds positions of rows; those of pack p, from 0, are
    ``order[starts[p]:starts[p + 1]]``. ``starts`` int64 [packs + 1].
    """

    order: np.ndarray
    starts: np.ndarray


class Packs:
    """Rows of ``lengths`` tokens in packs of at most ``max_length``; ``count`` packs an epoch.

    An epoch follows from the lengths, the seed and its number alone. A million rows take two or
    three seconds, and one for each epoch.
    """

    def __init__(self, lengths: np.ndarray, max_length: int, seed: int) -> None:
        """``lengths`` int [rows]. Raises ValueError for no rows, or one that is too long."""
        if not len(lengths):
            raise ValueError("there are no rows to pack")
        if int(lengths.max()) > max_length:
            raise ValueError(f"a row of {lengths.max():,} tokens does not fit into {max_length:,}")
        self.max_length = max_length
        self.seed = seed
        self.tokens = int(lengths.sum())
        self._lengths = np.asarray(lengths, dtype=np.int64)  # of the rows, and of the places
        self._pack_of_place, self.count = _places(self._lengths, max_length, seed)
        self._rows_of_pack = np.bincount(self._pack_of_place, minlength=self.count)
        self._kept: dict[int, PackedEpoch] = {}

    def __len__(self) -> int:
        return self.count

    @property
    def rows(self) -> int:
        return len(self._lengths)

    @property
    def fill(self) -> float:
        """The share of the packs' length that rows fill."""
        return self.tokens / (self.count * self.max_length)

    def most_rows(self, packs: int) -> int:
        """No ``packs`` packs of any epoch hold more rows."""
        return int(np.sort(self._rows_of_pack)[-packs:].sum())

    def epoch(self, number: int) -> PackedEpoch:
        """The rows of epoch ``number``, from 0; each of them once."""
        if number not in self._kept:
            while len(self._kept) >= EPOCHS_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[number] = self._made(number)
        return self._kept[number]

    def _made(self, number: int) -> PackedEpoch:
        generator = np.random.default_rng([self.seed, number])
        rows, places = (generator.permutation(self.rows) for _ in range(2))
        room = self._lengths.copy()
        _, of_pack = np.unique(self._pack_of_place[places], return_index=True)
        free = self.max_length - np.bincount(self._pack_of_place, self._lengths, self.count)
        room[places[of_pack]] += free.astype(np.int64)
        rows = rows[np.argsort(-self._lengths[rows], kind="stable")]
        places = places[np.argsort(-room[places], kind="stable")]
        found = _drawn(
            self._lengths[rows],
            room[places],
            generator.permutation(self.count)[self._pack_of_place[places]],
            generator.random(self.rows),
        )
        pack_of_row = np.empty(self.rows, dtype=np.int64)
        pack_of_row[rows] = found
        starts = np.concatenate([[0], np.cumsum(np.bincount(pack_of_row, minlength=self.count))])
        return PackedEpoch(np.argsort(pack_of_row, kind="stable"), starts)


def good_length(tokens: int, rows: int) -> int:
    """A length of packs that ``rows`` with so many tokens in all fill well; a multiple of 64."""
    return -(-ROWS_PER_PACK * tokens // (64 * rows)) * 64


def _drawn(
    lengths: np.ndarray, room: np.ndarray, packs: np.ndarray, chance: np.ndarray
) -> list[int]:
    """The pack of each row: of places with enough room that no longer row has taken, one by chance.

    ``lengths`` of the rows and ``room`` of the places, whose ``packs`` are given, both descend;
    ``chance`` float [rows] is in [0, 1). There is always a place: of n places the k-th largest
    holds the k-th longest row.
    """
    room_of, pack_of = room.tolist(), packs.tolist()
    places = len(room_of)
    found, open_places, seen = [], [], 0
    for length, share in zip(lengths.tolist(), chance.tolist(), strict=True):
        while seen < places and room_of[seen] >= length:
            open_places.append(pack_of[seen])
            seen += 1
        at = int(share * len(open_places))
        found.append(open_places[at])
        open_places[at] = open_places[-1]
        open_places.pop()
    return found


def _places(lengths: np.ndarray, max_length: int, seed: int) -> tuple[np.ndarray, int]:
    """The pack of each place, int64 [rows], and how many packs there are."""
    packed, fewest = _best_fit(lengths, np.argsort(-lengths, kind="stable"), max_length)
    most = fewest + int(PACKS_MORE * fewest)
    generator = np.random.default_rng(seed)
    for spread in SPREADS:
        if math.isinf(spread):
            order = generator.permutation(len(lengths))
        else:
            sizes = np.log(lengths) + spread * generator.standard_normal(len(lengths))
            order = np.argsort(-sizes, kind="stable")
        mixed, count = _best_fit(lengths, order, max_length, most)
        if count <= most:
            return mixed, count
    return packed, fewest


def _best_fit(
    lengths: np.ndarray, order: np.ndarray, max_length: int, most: int | None = None
) -> tuple[np.ndarray, int]:
    """The pack of each row, int64 [rows], and the number of packs, if put there in ``order``.

    Gives up, with no packs and a number above ``most``, where those would not do.
    """
    # Packs by the room that they have left. Bit n of a block's number says whether a pack has room
    # for so many tokens more than those of the blocks below, bit n of ``filled`` whether block n
    # has such a pack: the lowest bit from a row's length on is its best fit.
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    blocks = [0] * ((max_length >> BLOCK_BITS) + 1)
    filled = 0
    count = 0
    packs: list[int] = []
    for length in lengths[order].tolist():
        block = length >> BLOCK_BITS
        fitting = blocks[block] >> (length & IN_BLOCK)
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
        else:
            above = filled >> (block + 1)
            room = 0
            if above:
                block += (above & -above).bit_length()
                fitting = blocks[block]
                room = (block << BLOCK_BITS) + (fitting & -fitting).bit_length() - 1
        if room:
            same = with_room[room]
            pack = same.pop()
            if not same:
                blocks[block] ^= 1 << (room & IN_BLOCK)
                if not blocks[block]:
                    filled ^= 1 << block
        elif count == most:
            return np.empty(0, dtype=np.int64), count + 1
        else:
            pack, room = count, max_length
            count += 1
        packs.append(pack)
        room -= length
        if room:
            same = with_room[room]
            if not same:
                block = room >> BLOCK_BITS
                blocks[block] |= 1 << (room & IN_BLOCK)
                filled |= 1 << block
            same.append(pack)
    packed = np.empty(len(lengths), dtype=np.int64)
    packed[order] = packs
    return packed, count
