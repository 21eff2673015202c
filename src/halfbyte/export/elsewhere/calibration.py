"""The rows that a format is calibrated with: rows that trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np

from halfbyte.data.batch import TokenizedRow

# What GPTQ's and AWQ's authors take is 128 texts of 2048 tokens; rows of instructions are shorter.
ROWS, LONGEST = 256, 512
# Fewer say too little of which inputs a layer gets.
FEW = 64


def calibration_ids(
    pieces: Sequence[TokenizedRow], compared: Iterable[Sequence[int]]
) -> list[list[int]]:
    """Token ids of at most 256 rows, from all over ``pieces``, each cut to 512 tokens.

    Rows that are also among ``compared``, those that the result is judged by, are left out, however
    often they trained.
    """
    judged = {tuple(row[:LONGEST]) for row in compared}
    order = np.random.default_rng(0).permutation(len(pieces))
    cut = (tuple(int(token) for token in pieces[at].input_ids[:LONGEST]) for at in order)
    return [list(ids) for ids in islice((ids for ids in cut if ids and ids not in judged), ROWS)]
