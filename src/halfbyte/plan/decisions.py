"""A recipe in the course of being decided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from halfbyte.events.types import Choice
from halfbyte.plan import defaults
from halfbyte.recipe import Recipe
from halfbyte.recipe.settings import get, is_stated


@dataclass
class Decisions:
    """A copy of the recipe in which "auto" gives way to values, and why."""

    recipe: Recipe
    choices: list[Choice] = field(default_factory=list)

    @classmethod
    def of(cls, recipe: Recipe) -> Decisions:
        return cls(recipe.model_copy(deep=True))

    def is_open(self, key: str) -> bool:
        return bool(get(self.recipe, key) == "auto")

    def auto(self, key: str, decide: Callable[[], tuple[Any, str]]) -> None:
        """Decide ``key`` if the recipe leaves it open."""
        if self.is_open(key):
            self.set(key, *decide())

    def set(self, key: str, value: Any, reason: str) -> None:
        """Give ``key`` a value that the recipe does not state."""
        self.choices.append(Choice(key, get(self.recipe, key), value, reason))
        self.put(key, value)

    def put(self, key: str, value: Any) -> None:
        """Give ``key`` a value of which somebody else has told."""
        section, _, name = key.rpartition(".")
        setattr(get(self.recipe, section) if section else self.recipe, name, value)

    def tell_defaults(self) -> None:
        """The reasons of the defaults of what the recipe does not mention."""
        for key, reason in defaults.FIXED.items():
            if not is_stated(self.recipe, key):
                self.choices.append(Choice(key, None, get(self.recipe, key), reason))
