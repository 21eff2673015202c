"""Bytes that attention takes by PyTorch's memory-efficient kernels, beyond those of its tokens.

:mod:`halfbyte.kernels.attention_efficient` calls them where Triton has no matrix instructions, as
on a T4. They count each row of a pass, those that it only has room for included, as long as the
longest: R rows of up to M tokens have log-sums of 4·heads·R·⌈M/32⌉·32 bytes, which a layer keeps,
and the backward pass adds up the queries' gradients in fp32, in 4·heads·R·⌈M/128⌉·128·D' bytes (D'
is the heads' size, rounded up to what the kernels' tiles cover; none if the products are in fp32).
Of rows of like lengths that is about what the tokens take. In a pack it may be anything: of one of
16,192 tokens in rows of 8,192 and of 200, with room for 82 rows, the backward pass of one layer
with 32 heads of 128 took 11.7 GB on an H100, 11.0 of them for these sums.
"""

from __future__ import annotations

from typing import NamedTuple

SUMS_PER = 32  # the tokens to which a row's log-sums are rounded up
QUERIES_PER = 128  # and the gradients of its queries


class Room(NamedTuple):
    """What a pass has room for: so many rows, of so many tokens at most."""

    rows: int
    longest: int


def log_sums(heads: int, room: Room) -> int:
    """Bytes of one layer's log-sums, which it keeps for the backward pass."""
    return 4 * heads * room.rows * _rounded(room.longest, SUMS_PER)


def backward_bytes(heads: int, head_dim: int, itemsize: int, room: Room) -> int:
    """Bytes of the fp32 sums that come and go in one layer's backward pass."""
    if itemsize == 4:  # they are the gradients themselves
        return 0
    covered = 64 if head_dim <= 64 else _rounded(head_dim, 128)
    return 4 * heads * room.rows * _rounded(room.longest, QUERIES_PER) * covered


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
