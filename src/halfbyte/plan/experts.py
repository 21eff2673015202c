"""What becomes of a mixture's experts, and of a recipe that asks for adapters on them."""

from __future__ import annotations

from collections.abc import Iterable

from halfbyte.errors import ModelError
from halfbyte.events.types import Choice
from halfbyte.model.lora_targets import ALL_LINEAR, Targets, fits
from halfbyte.plan.parameters import ModelShape
from halfbyte.recipe.schema import LoraRecipe

# What checkpoints, transformers and PEFT call the matrices of experts, and the router beside them.
_MATRICES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3")
_ROUTERS = ("gate", "router")


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


def refuse_experts(lora: LoraRecipe, shape: ModelShape) -> None:
    """Raise ModelError for a target or an exclusion that only experts or a router fit."""
    for key in ("target_modules", "exclude_modules"):
        for target, layers, experts in _fitted(getattr(lora, key), shape, f"lora.{key}"):
            if layers or not experts:
                continue
            others = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in shape.linears))
            raise ModelError(
                f"lora.{key} is or holds {target!r}, which fits only this model's experts or "
                "router, and those get no adapters; leave it out, or name layers that every token "
                f"passes ({others})."
            )


def experts_warning(lora: LoraRecipe, shape: ModelShape) -> str | None:
    """A sentence on targets that layers and experts fit alike."""
    found = _fitted(lora.target_modules, shape, "lora.target_modules")
    both = [target for target, layers, experts in found if layers and experts]
    if not both:
        return None
    return (
        f"lora.target_modules: {', '.join(map(repr, both))} also fits this model's experts or "
        "router, and those get no adapters; only the linear layers that every token passes do."
    )


def _fitted(wanted: Targets, shape: ModelShape, key: str) -> Iterable[tuple[str, bool, bool]]:
    """Each target, whether it fits a linear layer, and whether experts or a router."""
    if not shape.experts or wanted == ALL_LINEAR:
        return
    experts, pattern = list(_names(shape)), isinstance(wanted, str)
    for target in [wanted] if isinstance(wanted, str) else wanted:

        def found(names: Iterable[str], target: str = target) -> bool:
            return any(fits(name, target, key, pattern=pattern) for name in names)

        yield target, found(shape.linears), found(experts)


def _names(shape: ModelShape) -> Iterable[str]:
    """What experts and routers may be called."""
    for name, layer in zip(shape.experts_named, shape.experts, strict=True):
        yield name
        yield from (f"{name}.{leaf}" for leaf in _MATRICES)
        yield from (f"{name.rpartition('.')[0]}.{leaf}" for leaf in _ROUTERS)
        for number in range(layer.count):
            yield from (f"{name}.{number}.{leaf}" for leaf in _MATRICES)
