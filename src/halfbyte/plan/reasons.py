"""Why steps are made in the way that was chosen, in words."""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.data.packing import Packs
from halfbyte.plan.strategy import Way, gigabytes
from halfbyte.plan.units import Units


def packing_reason(packs: Packs) -> str:
    """How well the packs are filled."""
    return (
        f"{packs.rows:,} rows in {packs.count:,} packs of {packs.max_length:,} tokens, "
        f"{100 * packs.fill:.1f} % filled"
    )


def accumulation_reason(made: int, units: Units) -> str:
    """Why a step has ``made`` rows or packs."""
    wanted = units.wanted_per_step
    of_rows = f", about {made * units.rows_each:.0f} rows" if units.packs is not None else ""
    near = "" if made == wanted else f", as near to {wanted} as the batch allows"
    return f"{made} {units.words} a step{of_rows}{near}"


def recompute_reason(way: Way, found: Sequence[Way], fits: bool, of: str) -> tuple[bool, str]:
    """Whether layers are recomputed, and why; ``found`` are all ways, ``of`` what there is."""
    alike = [w for w in found if w.batch_size == way.batch_size]
    none = min((w for w in alike if not w.checkpointing), key=_needs)
    every = min((w for w in alike if w.recomputed_layers == w.layers), key=_needs)
    if not way.checkpointing:
        return False, (
            f"all activations fit: about {gigabytes(way.memory.total)} of {of}; recomputing "
            f"would save {gigabytes(none.memory.total - every.memory.total)} and cost time"
        )
    if not fits:
        return True, "memory is short, and recomputing needs the least"
    if way.recomputed_layers < way.layers:
        return True, (
            f"{way.recomputed_layers} of {way.layers} layers are recomputed: keeping all "
            f"activations would need at least {gigabytes(none.memory.total)} and there are {of}"
        )
    return True, (
        f"keeping all activations would need about {gigabytes(none.memory.total)} and there are "
        f"{of}; recomputing needs {gigabytes(way.memory.total)}"
    )


def _needs(way: Way) -> int:
    return way.memory.total


def copies(way: Way) -> str:
    """Of which layers dequantized copies are kept."""
    if way.copied_layers in (0, way.layers):
        return "all layers" if way.copied_layers else "none"
    return f"{way.copied_layers} of {way.layers} layers"


def copy_reason(way: Way, of: str) -> str:
    """Why of so many."""
    size = gigabytes(way.memory.copy)
    if way.copied_layers == way.layers:
        return (
            f"a dequantized copy of the weights ({size}) fits and saves dequantizing them in every "
            "pass; the numbers are the same"
        )
    if way.copied_layers:
        return (
            f"as many dequantized copies as fit ({size}), of {of}; they save dequantizing these "
            "weights in every pass, and the numbers are the same"
        )
    return f"dequantized copies of the weights would take memory that the step needs more, of {of}"
