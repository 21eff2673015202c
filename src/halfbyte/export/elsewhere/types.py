"""The formats that other packages write, and the types of their weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from halfbyte.errors import ModelError


@dataclass(frozen=True)
class ElsewhereType:
    """A type by its name. Matrices have ``bits`` a weight (None: all 16 of ``dtype``), and a scale
    for each group of weights in a row.

    ``groups`` are the sizes to choose from, the first one that divides all rows. A folder counts as
    the model that it was made of up to ``largest_kl``, the mean Kullback–Leibler divergence of its
    logits (nats a token).
    """

    name: str
    bits: int | None
    groups: tuple[int, ...]
    largest_kl: float
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Target:
    """A format: who writes it, and what it can be written in.

    ``module`` is the package's name to Python and ``package`` to pip, ``extra`` the one of
    halfbyte's that brings it, ``variable`` the environment variable that names a Python which has
    it. ``calibrated`` formats are made with texts to run through the model.
    """

    name: str
    package: str
    module: str
    extra: str
    variable: str
    types: Mapping[str, ElsewhereType]
    default: str
    calibrated: bool

    def weight_type(self, name: str | None) -> ElsewhereType:
        """Raises ModelError for a type that is not this format's."""
        found = self.types.get((name or self.default).lower())
        if found is None:
            near = difflib.get_close_matches((name or "").lower(), self.types, n=1)
            meant = f"did you mean {near[0]}? It is one of" if near else "name one of"
            raise ModelError(
                f"--type {name} is no type that --to {self.name} writes; {meant} "
                f"{', '.join(self.types)}."
            )
        return found


def _table(*types: ElsewhereType) -> dict[str, ElsewhereType]:
    return {type.name: type for type in types}


# Bounds: two to ten times what SmolLM2-135M was measured to lose, which being small loses most
# (docs/exporting.md). mlx-lm multiplies in 16 bits, which is most of what bf16 loses.
_MLX_GROUPS = (64, 32)
_MLX = _table(
    ElsewhereType("f16", None, (), 2e-3, torch.float16),
    ElsewhereType("bf16", None, (), 2e-2),
    ElsewhereType("q8", 8, _MLX_GROUPS, 0.05),
    ElsewhereType("q6", 6, _MLX_GROUPS, 0.1),
    ElsewhereType("q5", 5, _MLX_GROUPS, 0.5),
    ElsewhereType("q4", 4, _MLX_GROUPS, 1.5),
    ElsewhereType("q3", 3, _MLX_GROUPS, 3.0),
)
# The group sizes that vLLM's kernels for such weights know.
_COMPRESSED_GROUPS = (128, 64, 32)
_W4A16 = ElsewhereType("w4a16", 4, _COMPRESSED_GROUPS, 1.5)
_W8A16 = ElsewhereType("w8a16", 8, _COMPRESSED_GROUPS, 0.05)


def _compressed(name: str, *types: ElsewhereType) -> Target:
    return Target(
        name=name,
        package="llmcompressor",
        module="llmcompressor",
        extra="compress",
        variable="HALFBYTE_COMPRESSOR_PYTHON",
        types=_table(*types),
        default="w4a16",
        calibrated=True,
    )


TARGETS = {
    "mlx": Target(
        name="mlx",
        package="mlx-lm",
        module="mlx_lm",
        extra="mlx",
        variable="HALFBYTE_MLX_PYTHON",
        types=_MLX,
        default="q4",
        calibrated=False,
    ),
    "gptq": _compressed("gptq", _W4A16, _W8A16),
    "awq": _compressed("awq", _W4A16),
}
