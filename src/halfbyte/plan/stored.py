"""What a checkpoint that is in 4 bits already decides, whatever the recipe says."""

from __future__ import annotations

from halfbyte.events.types import Choice
from halfbyte.model.bnb_checkpoint import StoredNF4
from halfbyte.plan.parameters import ModelShape
from halfbyte.recipe import Recipe
from halfbyte.recipe.settings import get

_AS_STORED = "the checkpoint is in bitsandbytes' NF4 already, and its codes are taken bit for bit"


def about_experts(shape: ModelShape) -> list[Choice]:
    """What becomes of a mixture's experts, of which no setting speaks."""
    if not shape.experts:
        return []
    form = "16 bits" if shape.experts_left_out else "NF4"
    share = shape.in_experts / shape.frozen
    return [
        Choice(
            "experts",
            None,
            f"frozen in {form}, without adapters",
            f"they are {share:.0%} of the model, and each sees few tokens; adapters are on the "
            "linear layers that every token passes, and the router is left as it is",
        )
    ]


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
