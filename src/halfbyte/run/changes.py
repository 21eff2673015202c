"""A run that goes on with other settings than it began with: which may change, and who says so."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError, RunError
from halfbyte.recipe import Recipe
from halfbyte.recipe.load import load_recipe
from halfbyte.recipe.settings import get, settings

# Consent to what is no setting: to go on with another device, or other versions.
MACHINE = "machine"

# They decide no weight: what is shown, kept and measured, and how much memory there is.
FREE = (
    *("title", "author", "objective", "device", "memory_limit_gb"),
    *("data.cache", "training.logging_steps"),
)
FREE_SECTIONS = ("report", "checkpoints", "evaluation", "trackers")

# Where something lies. What lies there is compared by its hash.
PLACES = ("model.name", "model.revision", "data.path", "data.held_out_path", "data.sources")

# What makes sense to change for the rest of a run, if somebody says so by name.
BY_NAME = (
    "training.learning_rate",
    "training.lr_scheduler",
    "training.warmup_steps",
    "training.epochs",
    "training.max_steps",
    "training.weight_decay",
    "training.max_grad_norm",
    "training.adam_beta1",
    "training.adam_beta2",
    "training.adam_epsilon",
    "lora.lora_dropout",
)
SECTIONS_BY_NAME = ("watch",)


@dataclass(frozen=True)
class Change:
    """A setting that is another one from here on."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} {_text(self.before)} → {_text(self.now)}"


def require_known(allow: Collection[str]) -> None:
    """Raises RunError for a name that ``--allow`` does not take."""
    for name in allow:
        if name != MACHINE and not may_change(name):
            raise RunError(
                f"--allow takes {MACHINE} or a setting that may change when a run goes on, which "
                f"{name} is not; those are {', '.join(BY_NAME)} and those of "
                f"{', '.join(SECTIONS_BY_NAME)}."
            )


def changed_recipe(
    folder: Path, began: Recipe, wanted: Recipe, allow: Collection[str]
) -> tuple[Recipe, list[Change]]:
    """The recipe that the run of ``folder`` goes on with, and what is new in it.

    ``began`` is the effective one it was begun with; what ``wanted`` leaves open stays as it was
    decided then. Raises RunError, with the difference, where a setting is another one that cannot
    change, or that ``allow`` does not name.
    """
    asked = _asked(folder)
    changes = []
    for key in settings():
        before, now = _comparable(began, key), _comparable(wanted, key)
        if now == before:
            continue
        if now == "auto":
            if key not in asked or asked[key] == "auto" or _is_free(key):
                continue
        elif key != "training.max_steps" and key in asked and asked[key] == now:
            continue  # as asked for when the run began, and written in another way since
        changes.append(Change(key, get(began, key), get(wanted, key)))
    refused = [c for c in changes if not _is_free(c.key) and c.key not in allow]
    if refused:
        raise RunError(_difference(folder, refused))
    recipe = began
    for key in PLACES:
        recipe = _with(recipe, key, get(wanted, key))
    for change in changes:
        recipe = _with(recipe, change.key, change.now)
    return recipe, changes


def asks_for_more(changes: Sequence[Change]) -> bool:
    """Whether there may be steps to make with ``changes``, after the run has finished."""
    return any(change.key in ("training.epochs", "training.max_steps") for change in changes)


def _difference(folder: Path, refused: Sequence[Change]) -> str:
    shown = ", ".join(str(change) for change in refused)
    named = [c.key for c in refused if may_change(c.key)]
    never = [c.key for c in refused if not may_change(c.key)]
    if never:
        todo = f"{', '.join(never)} cannot change; put that back or start a new run"
    else:
        todo = f"{' '.join(f'--allow {key}' for key in named)} goes on with what is new"
    return f"{folder} was begun with another recipe ({shown}); {todo}."


def _asked(folder: Path) -> dict[str, Any]:
    """The settings that were asked for when the run began, where they can still be read."""
    try:
        asked = load_recipe(folder / "recipe.asked.yaml")
    except HalfbyteError:
        return {}
    return {key: _comparable(asked, key) for key in settings()}


def _comparable(recipe: Recipe, key: str) -> Any:
    value = get(recipe, key)
    if key == "data.sources":  # where they lie is compared by what lies there
        return [source.model_dump(exclude={"path"}) for source in value]
    if key in PLACES:
        return None
    return value


def _with(recipe: Recipe, key: str, value: Any) -> Recipe:
    section, _, name = key.rpartition(".")
    if not section:
        return recipe.model_copy(update={name: value})
    changed = get(recipe, section).model_copy(update={name: value})
    return _with(recipe, section, changed)


def _is_free(key: str) -> bool:
    return key in FREE or _section(key) in FREE_SECTIONS


def may_change(key: str) -> bool:
    """Whether the setting ``key`` may be another one for the rest of a run, if it is named."""
    return key in BY_NAME or (key in settings() and _section(key) in SECTIONS_BY_NAME)


def _section(key: str) -> str:
    return key.split(".")[0]


def _text(value: Any) -> str:
    return "none" if value is None else str(value)
