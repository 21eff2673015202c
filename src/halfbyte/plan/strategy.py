"""How to make a step on this device: rows in a pass, recomputing, a copy of the weights.

Of the ways that fit into memory the fastest is taken, and of those nearly as fast the one that
needs least. What the recipe states is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from halfbyte.plan.device import Device
from halfbyte.plan.memory import Setup, StepMemory, step_memory
from halfbyte.plan.parameters import ModelShape
from halfbyte.plan.speed import device_speed, step_seconds

ROWS_PER_STEP = 16
_NEARLY = 1.03  # as fast as the fastest, for an estimate


@dataclass(frozen=True)
class Way:
    """One way of making a step, with what it costs."""

    batch_size: int
    gradient_accumulation: int
    checkpointing: bool
    keep_copy: bool
    memory: StepMemory
    seconds: float


@dataclass(frozen=True)
class Budget:
    """Bytes that a run may use, and of what."""

    bytes: int
    words: str


def budget(device: Device, limit_gb: float | None = None) -> Budget:
    """Nine tenths of a GPU's memory, seven tenths of a CPU's; or what the recipe allows.

    All of the memory counts and not what happens to be free, so that the same recipe is resolved
    the same way twice on one machine; unless other programs hold more than half of it.
    """
    if limit_gb is not None:
        return Budget(int(limit_gb * 1e9), f"the {limit_gb:g} GB that the recipe allows")
    share = 0.9 if device.kind == "cuda" else 0.7
    of = "the GPU's memory" if device.kind == "cuda" else "main memory"
    if 2 * device.free_bytes < device.memory_bytes:
        return Budget(int(0.9 * device.free_bytes), f"the {gigabytes(device.free_bytes)} free now")
    return Budget(int(share * device.memory_bytes), f"{gigabytes(device.memory_bytes)} of {of}")


def ways(
    shape: ModelShape,
    setup: Setup,
    device: Device,
    *,
    row_tokens: int,
    batches: Sequence[tuple[int, int]],
    checkpointing: Sequence[bool],
) -> list[Way]:
    """All ways with one of ``batches`` (rows in a pass, passes in a step) and ``checkpointing``.

    ``row_tokens`` is the longest row in tokens: a pass has at most that many times its rows.
    """
    speed = device_speed(device, setup.precision)
    found = []
    for (rows, passes), recompute, copy in product(batches, checkpointing, (True, False)):
        tokens = rows * row_tokens
        memory = step_memory(shape, setup, tokens=tokens, checkpointing=recompute, keep_copy=copy)
        seconds = step_seconds(
            shape,
            setup,
            speed,
            tokens=tokens,
            row_tokens=row_tokens,
            passes=passes,
            checkpointing=recompute,
            keep_copy=copy,
        )
        found.append(Way(rows, passes, recompute, copy, memory, seconds))
    return found


def choose_way(found: Sequence[Way], limit: Budget) -> tuple[Way, bool]:
    """The best of ``found``, and whether it fits ``limit``; the smallest where none does.

    Among ways nearly as fast as the fastest, one with a copy of the weights comes first: the
    estimate of what dequantizing costs is the least certain, and memory that fits is free.
    """
    fitting = [way for way in found if way.memory.total <= limit.bytes]
    if not fitting:
        return min(found, key=lambda way: way.memory.total), False
    best = min(way.seconds for way in fitting)
    near = [way for way in fitting if way.seconds <= _NEARLY * best]
    return min(near, key=lambda way: (not way.keep_copy, way.memory.total)), True


def possible_batches(batch_size: int | str, accumulation: int | str) -> list[tuple[int, int]]:
    """Rows in a pass and passes in a step that make about 16 rows a step of what is not stated."""
    if batch_size != "auto":
        rows = int(batch_size)
        passes = max(1, round(ROWS_PER_STEP / rows)) if accumulation == "auto" else accumulation
        return [(rows, int(passes))]
    if accumulation != "auto":
        return [(max(1, ROWS_PER_STEP // int(accumulation)), int(accumulation))]
    return [(rows, ROWS_PER_STEP // rows) for rows in (1, 2, 4, 8, 16)]


def gigabytes(size: float) -> str:
    """Bytes in words: 1.4 GB."""
    return f"{size / 1e9:,.1f} GB" if size >= 5e7 else f"{size / 1e6:,.1f} MB"
