"""What a checkpoint that is in 4 bits already decides, whatever the recipe says."""

from __future__ import annotations

from halfbyte.events.types import Choice
from halfbyte.model.bnb_checkpoint import StoredNF4
from halfbyte.recipe import Recipe
from halfbyte.recipe.settings import get

_AS_STORED = "the checkpoint is in bitsandbytes' NF4 already, and its codes are taken bit for bit"


def as_stored(recipe: Recipe, stored: StoredNF4) -> list[Choice]:
    """The settings of ``recipe`` that give way to the checkpoint, with their new values."""
    there = {
        "quantization.block_size": (stored.block_size, f"{_AS_STORED}, in blocks of its own size"),
        "quantization.double_quant": (stored.double_quant, f"{_AS_STORED}, with its own scales"),
        "evaluation.base_loss": (
            False,
            "the checkpoint is in 4 bits already, and the loss of what it was made of cannot be "
            "measured without the original weights",
        ),
    }
    return [
        Choice(key, get(recipe, key), value, why)
        for key, (value, why) in there.items()
        if get(recipe, key) != value
    ]
