"""benchmarks/floors.py against numbers worked out by hand."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
floors = importlib.import_module("floors")

# One layer: 4 wide, 2 query heads and 1 key/value head of 2, 6 within, 10 words, r = 1.
TINY = floors.Shape(
    hidden=4,
    intermediate=6,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=2,
    vocabulary=10,
    rank=1,
)
ROWS = [3, 2]


def part(name: str, recomputed: int = 0) -> list[object]:
    return floors.of_part(floors.step_work(TINY, ROWS, labels=4, recomputed=recomputed), name)


def test_a_layer_counted_by_hand() -> None:
    # Products of 5 tokens with B folded in: 4 + 3 columns and 8 rows (q 4, k 2, v 2), 4 + 1 and 4,
    # 4 and 12, 6 and 4.
    forward = 2 * 5 * (7 * 8 + 5 * 4 + 4 * 12 + 6 * 4)
    assert floors.operations(part(floors.FORWARD)) == forward == 1480
    assert floors.operations(part(floors.BACKWARD)) == forward
    again = 2 * 5 * (7 * 8 + 5 * 4 + 4 * 12)
    assert floors.operations(part(floors.BACKWARD, recomputed=1)) == forward + again
    numbers = [5 * (7 + 8) + 7 * 8, 5 * (5 + 4) + 5 * 4, 5 * (4 + 12) + 4 * 12, 5 * (6 + 4) + 6 * 4]
    assert floors.moved(part(floors.FORWARD)) == 2 * sum(numbers) == 796

    # Scores under the causal mask: 6 and 3 of each of 2 heads, 2 products forward and 5 backward.
    assert floors.operations(part(floors.ATTENTION)) == (2 + 5) * 2 * (6 + 3) * 2 * 2
    # For each of q, k, v and o: x A, g A and gᵀ x with 4 columns, dyᵀ u with 4, 2, 2 and 4 rows.
    assert floors.operations(part(floors.THIN)) == 2 * 5 * (4 * 3 * 4 + 4 + 2 + 2 + 4)
    assert floors.operations(part(floors.HEAD)) == 2 * 2 * 4 * 4 * 10

    # Three norms of 5 x 4 elements. The first reads 4 bytes and writes 2, the others read 4 + 2 and
    # write 4 + 2; backward 2 + 4 are read, 4 changed and 2 written, the last norm's 4 but written.
    assert floors.moved(part(floors.NORMS)) == 20 * (6 + 2 * 12 + 2 * 16 + 12)
    assert floors.moved(part(floors.GATED)) == 2 * 5 * 6 * (3 + 5)
    assert floors.moved(part(floors.ROTARY)) == 2 * (2 * 2 * 5 * 3 * 2)


def test_trained_elements_and_weights_are_tinyllamas() -> None:
    assert floors.TINYLLAMA.trained == 4_505_600
    assert floors.TINYLLAMA.linear == 1_100_048_384 - 2 * 32_000 * 2048 - 45 * 2048


def test_a_launch_takes_the_longer_of_its_operations_and_its_bytes() -> None:
    card = floors.Card("a card", tflops=1e-6, gb_per_s=1e-3)  # 1e6 a second each
    work = [floors.Work("x", 2, 3000, 1000), floors.Work("x", 1, 0, 5000)]
    assert floors.floor_ms(work, card) == pytest.approx(2 * 3 + 5)


def test_launches_are_those_of_the_fused_layers() -> None:
    """As many as model/fused_layer.py makes: 30 a layer, 53 where it is recomputed."""

    def in_layers(number: int, **ways: int) -> int:
        shape = floors.Shape(layers=number)
        return floors.kernels(floors.step_work(shape, [64], labels=64, **ways))

    assert in_layers(2) - in_layers(1) == 30
    # Made again: all but the activation and the product behind it, and what a norm's sum was.
    assert in_layers(2, recomputed=1) - in_layers(2) == 11
    # For both passes 4 weights out of NF4, and 2 of them with B folded in.
    assert in_layers(3, from_nf4=2) - in_layers(3, from_nf4=1) == 8 + 4
