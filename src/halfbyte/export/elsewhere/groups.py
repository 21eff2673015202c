"""How many weights of a row share a scale."""

from __future__ import annotations

from typing import Any

from halfbyte.errors import ModelError
from halfbyte.export.elsewhere.types import ElsewhereType, Target
from halfbyte.model.skeleton import quantized_linears


def choose_group(network: Any, target: Target, type: ElsewhereType) -> tuple[int | None, list[str]]:
    """The size of a group, None for a type without; and what is to be said of it.

    It is the first of the type's that divides the rows of all linear layers of ``network``. Where
    none does, mlx-lm leaves such layers in 16 bits, and for the other formats ModelError is raised.
    """
    if type.bits is None:
        return None, []
    rows = {int(layer.in_features): name for name, layer in quantized_linears(network).items()}
    for group in type.groups:
        if all(row % group == 0 for row in rows):
            break
    else:
        group = type.groups[-1]
        row = next(row for row in rows if row % group)
        if target.calibrated:
            raise ModelError(
                f"{rows[row]} has rows of {row:,} weights, which are no whole groups of {group}, "
                f"as --to {target.name} needs; choose --to gguf or --to mlx."
            )
    if group == type.groups[0]:
        return group, []
    row = next(row for row in rows if row % type.groups[0])
    return group, [
        f"weights share a scale in groups of {group} and not {type.groups[0]}, of which a row of "
        f"{row:,} is no multiple"
    ]
