"""A recipe holds no secrets: it is copied into the run, the report and the trackers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from halfbyte.errors import RecipeError
from halfbyte.recipe.schema import RecipeFields
from halfbyte.recipe.yaml_tree import Path, dotted
from halfbyte.redaction import redact


def find_secret(recipe: RecipeFields) -> Path | None:
    """Where the first setting stands that holds a secret; None where none does."""
    texts = _texts(recipe.model_dump(), ())
    return next((path for path, text in texts if redact(text) != text), None)


def secret_found(path: Path) -> str:
    """The sentence about it, to follow the file and the line."""
    return (
        f"{redact(dotted(path))} holds what looks like a token or a password, and a recipe is "
        "copied into the run and its report; put it into the environment instead (HF_TOKEN for "
        "the hub)."
    )


def refuse_secrets(recipe: RecipeFields) -> None:
    """Raises RecipeError where a setting of ``recipe`` holds a secret, without repeating it."""
    path = find_secret(recipe)
    if path is not None:
        raise RecipeError(secret_found(path))


def _texts(value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inside in value.items():
            yield (*path, str(key)), str(key)
            yield from _texts(inside, (*path, str(key)))
    elif isinstance(value, list):
        for number, inside in enumerate(value):
            yield from _texts(inside, (*path, number))
