"""The optimizer that a recipe names."""

from __future__ import annotations

from halfbyte.optim.adamw import AdamW
from halfbyte.optim.adamw_8bit import AdamW8bit
from halfbyte.optim.flat import FlatParameters
from halfbyte.recipe.schema import Optimizer, TrainingRecipe


def make_optimizer(
    name: Optimizer,
    parameters: FlatParameters,
    training: TrainingRecipe,
    *,
    use_kernels: bool = False,
) -> AdamW:
    """The optimizer ``name`` of ``parameters``, with β, ε and weight decay of ``training``.

    ``paged_adamw_8bit`` computes what ``adamw_8bit`` does, with its state in main memory where a
    GPU's kernels can read it there. ``use_kernels`` allows Triton's kernels where there are Triton
    and a GPU.
    """
    if name == "adamw":
        return AdamW(parameters, training, use_kernels=use_kernels)
    paged = name == "paged_adamw_8bit"
    return AdamW8bit(parameters, training, use_kernels=use_kernels, paged=paged)
