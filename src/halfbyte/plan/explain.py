"""What can be said of a recipe before its model and its rows are at hand."""

from __future__ import annotations

from halfbyte.events.types import Choice, Event, Warned
from halfbyte.plan import defaults
from halfbyte.plan.decisions import Decisions
from halfbyte.plan.device import Device, find_device
from halfbyte.plan.precision import precision_warning
from halfbyte.plan.resolve import LOSS_AT_STEPS, decide_device
from halfbyte.recipe import Recipe
from halfbyte.recipe.settings import get, settings

# What a setting that is still open waits for.
_MODEL = "decided when the model is known"
_ROWS = "decided when the rows are known"
_BOTH = "decided when the model and the rows are known"
_WAITS = {
    "quantization.upcast_rest": _BOTH,
    "data.template": _MODEL,
    "training.learning_rate": "2e-4, or 1e-4 from 13B parameters up: " + _MODEL,
    "training.batch_size": "by memory and time: " + _BOTH,
    "training.gradient_accumulation": "16 rows a step: " + _BOTH,
    "training.gradient_checkpointing": "by memory: " + _BOTH,
    "report.loss_at_steps": LOSS_AT_STEPS,
}


def explain(recipe: Recipe, device: Device | None = None) -> tuple[Recipe, list[Event]]:
    """``recipe`` as far as ``device`` (by default this machine's) decides it, with the reasons.

    The events are a Choice for each setting that has a reason, and what is to be warned of.
    A setting that waits for the model or the rows stays "auto", and its Choice says for what.
    Nothing is read but the machine. Raises DeviceError where a GPU is stated and there is none.
    """
    device = device or find_device(recipe.device)
    decided = Decisions.of(recipe)
    decide_device(decided, device)
    decided.tell_defaults()
    decided.auto("lora.lora_alpha", lambda: defaults.lora_alpha(decided.recipe.lora))
    for key in settings():
        if decided.is_open(key):
            decided.choices.append(Choice(key, "auto", "auto", _WAITS.get(key, _ROWS)))
    if get(recipe, "training.optimizer") == "paged_adamw_8bit":
        decided.choices.append(
            Choice(
                "training.optimizer",
                "paged_adamw_8bit",
                "paged_adamw_8bit",
                "computes what adamw_8bit does; whether anything is paged is told "
                + _MODEL.removeprefix("decided "),
            )
        )
    warning = None if recipe.precision == "auto" else precision_warning(recipe.precision, device)
    return decided.recipe, [*decided.choices, *([Warned(warning)] if warning else [])]
