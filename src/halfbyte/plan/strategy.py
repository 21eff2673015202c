"""How to make a step on this device: rows in a pass, recomputing, copies of the weights.

Of the ways that fit into memory the fastest is taken, and of those nearly as fast the one that
needs least. What the recipe states is not touched. By fused layers some of the layers may be
recomputed and some have a copy, so that memory is used up to the last layer that fits; otherwise
it is all of them or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from halfbyte.plan.device import Device
from halfbyte.plan.memory import Setup, StepMemory, padded_attention, step_memory
from halfbyte.plan.memory_attention import Room
from halfbyte.plan.memory_fused import FusedMemory
from halfbyte.plan.parameters import ModelShape
from halfbyte.plan.speed import device_speed, step_seconds

ROWS_PER_STEP = 16
_NEARLY = 1.03  # as fast as the fastest, for an estimate


ALLOCATOR_SLACK = 1.03
LIBRARY_BYTES = 0.15e9


@dataclass(frozen=True)
class Way:
    """One way of making a step, with what it costs.

    ``batch_size`` counts rows, or packs of them; ``tokens`` are the positions of the largest pass.
    Of its ``layers`` the first ``recomputed_layers`` are recomputed, and of the first
    ``copied_layers`` a copy is kept.
    """

    batch_size: int
    gradient_accumulation: int
    tokens: int
    layers: int
    recomputed_layers: int
    copied_layers: int
    memory: StepMemory
    seconds: float
    room: Room
    padding: int  # bytes of attention that are there for padding rows to the longest

    @property
    def checkpointing(self) -> bool:
        return self.recomputed_layers > 0


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
        allowed, words = limit_gb * 1e9, f"the {limit_gb:g} GB that the recipe allows"
        if device.kind == "cuda":
            # The limit is the process's. On an H100 the kernels' code and the graphs took 0.12 GB
            # beside PyTorch's memory, and in pages the allocator holds on to little more than is
            # in use.
            allowed = max(0.0, allowed / ALLOCATOR_SLACK - LIBRARY_BYTES)
            words += f", {gigabytes(allowed)} of it for tensors"
        return Budget(int(allowed), words)
    share = 0.9 if device.kind == "cuda" else 0.7
    of = "the GPU's memory" if device.kind == "cuda" else "main memory"
    if 2 * device.free_bytes < device.memory_bytes:
        return Budget(int(0.9 * device.free_bytes), f"the {gigabytes(device.free_bytes)} free now")
    return Budget(int(share * device.memory_bytes), f"{gigabytes(device.memory_bytes)} of {of}")


@dataclass(frozen=True)
class PassSize:
    """A forward pass: its positions, how many of them are learned, the longest of its rows, and
    for how many rows it has room."""

    tokens: int
    labels: int
    row_tokens: int
    rows: int = 1

    @property
    def room(self) -> Room:
        return Room(self.rows, min(self.row_tokens, self.tokens))


def ways(
    shape: ModelShape,
    setup: Setup,
    device: Device,
    limit: Budget,
    *,
    largest: Callable[[int, int], PassSize],
    batches: Sequence[tuple[int, int]],
    checkpointing: Sequence[bool],
) -> list[Way]:
    """The ways to choose from, with one of ``batches`` (rows or packs in a pass, passes in a step).

    ``largest(rows, passes)`` is the largest pass of such a batch. ``checkpointing`` says whether
    all layers may be recomputed, none, or as many as it takes. Of fused layers as many have a copy
    as fit into ``limit`` with what is recomputed.
    """
    speed = device_speed(device, setup.precision)
    adapter = sum(setup.trained(shape))
    fused = FusedMemory(shape, setup) if setup.fused else None
    layers = shape.layers
    found = []
    for rows, passes in batches:
        size = largest(rows, passes)
        padded, apart = (
            padded_attention(shape, setup, size.tokens, room)[1] for room in (size.room, None)
        )
        padding = max(0, padded - apart)
        for recomputed, copied, memory in _memories(
            shape, setup, fused, size, checkpointing, limit
        ):
            seconds = step_seconds(
                shape,
                setup,
                speed,
                tokens=size.tokens,
                row_tokens=size.row_tokens,
                passes=passes,
                recomputed=recomputed,
                copied=copied,
                adapter=adapter,
            )
            found.append(
                Way(
                    rows,
                    passes,
                    size.tokens,
                    layers,
                    recomputed,
                    copied,
                    memory,
                    seconds,
                    size.room,
                    padding,
                )
            )
    return found


def _memories(
    shape: ModelShape,
    setup: Setup,
    fused: FusedMemory | None,
    size: PassSize,
    checkpointing: Sequence[bool],
    limit: Budget,
) -> Iterator[tuple[int, int, StepMemory]]:
    """Layers recomputed, layers of which a copy is kept, and what that takes."""
    layers, tokens, labels = shape.layers, size.tokens, size.labels
    if fused is None:
        for recompute, copy in product(checkpointing, (True, False)):
            memory = step_memory(
                shape, setup, tokens=tokens, checkpointing=recompute, keep_copy=copy, room=size.room
            )
            yield layers * recompute, layers * copy, memory
        return
    counts = range(layers + 1) if len(checkpointing) > 1 else [layers * checkpointing[0]]
    for recomputed in counts:
        most = fused.most_copies(tokens, labels, recomputed, limit.bytes, size.room)
        for copied in {0, most}:
            memory = fused.step(
                tokens, labels, recomputed=recomputed, copied=copied, room=size.room
            )
            yield recomputed, copied, memory


def choose_way(found: Sequence[Way], limit: Budget) -> tuple[Way, bool]:
    """The best of ``found``, and whether it fits ``limit``; the smallest where none does.

    Of each batch the fastest way counts. Among batches nearly as fast as the fastest, one with
    more copies of the weights comes first: the estimate of what dequantizing costs is the least
    certain, and memory that fits is free.
    """
    fitting = [way for way in found if way.memory.total <= limit.bytes]
    if not fitting:
        return min(found, key=lambda way: way.memory.total), False
    fitting.sort(key=lambda way: (way.seconds, way.memory.total))
    of_batch = {(way.batch_size, way.gradient_accumulation): way for way in reversed(fitting)}
    near = [way for way in of_batch.values() if way.seconds <= _NEARLY * fitting[0].seconds]
    return min(near, key=lambda way: (-way.copied_layers, way.memory.total)), True


def possible_batches(
    batch_size: int | str, accumulation: int | str, per_step: int = ROWS_PER_STEP
) -> list[tuple[int, int]]:
    """Rows in a pass and passes in a step of what is not stated, about ``per_step`` a step.

    The same of packs, of which ``per_step`` hold about 16 rows.
    """
    if batch_size != "auto":
        rows = int(batch_size)
        passes = max(1, round(per_step / rows)) if accumulation == "auto" else accumulation
        return [(rows, int(passes))]
    if accumulation != "auto":
        return [(max(1, per_step // int(accumulation)), int(accumulation))]
    return [(rows, per_step // rows) for rows in range(1, per_step + 1) if per_step % rows == 0]


def gigabytes(size: float) -> str:
    """Bytes in words: 1.4 GB."""
    return f"{size / 1e9:,.1f} GB" if size >= 5e7 else f"{size / 1e6:,.1f} MB"
