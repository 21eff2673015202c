"""``--set section.key=value``."""

from __future__ import annotations

from typing import Any

from halfbyte.errors import RecipeError
from halfbyte.recipe.names import unknown_key
from halfbyte.recipe.settings import join, names_in, sections, settings
from halfbyte.recipe.yaml_tree import Path, Tree, read_tree
from halfbyte.redaction import redact


def apply_override(tree: Tree, override: str) -> None:
    """Put ``section.key=value`` into ``tree``; a section takes ``{key: value, …}``.

    Raises RecipeError that names the override.
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    shown = redact(override)  # a secret that is cut is no longer seen as one
    place = f"--set {shown if len(shown) <= 80 else shown[:77] + '…'}"
    if not equals or not key:
        raise RecipeError(f"{place} is not of the form section.key=value.")
    if key in sections():
        value = _parsed(text, place)
        if not isinstance(value, dict):
            names = names_in(key)
            raise RecipeError(
                f"{place}: {key} is a section; set one of its settings, such as {key}.{names[0]}=…."
            )
        _put_all(tree, key, value, place)
        return
    if key not in settings():
        raise RecipeError(f"{place}: {unknown_key(key)}")
    _put(tree, tuple(key.split(".")), _value(key, text, place), place)


def _value(key: str, text: str, place: str) -> Any:
    """Text as it is for a setting that takes any, since ``#`` and ``: `` are common in it."""
    stripped = text.strip()
    if settings()[key].is_text and stripped[:1] not in ("'", '"'):
        return None if stripped in ("", "~", "null") else text
    return _parsed(text, place)


def _parsed(text: str, place: str) -> Any:
    try:
        return read_tree(text, "value").values
    except RecipeError as error:
        problem = str(error).partition(": ")[2].removeprefix("not valid YAML: ")
        raise RecipeError(f"{place}: the value is not valid YAML: {problem}") from None


def _put_all(tree: Tree, section: str, values: dict[str, Any], place: str) -> None:
    for name, value in values.items():
        key = join(section, name)
        if key in sections() and isinstance(value, dict):
            _put_all(tree, key, value, place)
        elif key in sections():
            raise RecipeError(f"{place}: {key} is a section; it takes {{key: value}}.")
        elif key in settings():
            _put(tree, tuple(key.split(".")), value, place)
        else:
            raise RecipeError(f"{place}: {unknown_key(key)}")


def _put(tree: Tree, path: tuple[str, ...], value: Any, place: str) -> None:
    holder = tree.values
    for depth, part in enumerate(path[:-1], start=1):
        holder = holder.setdefault(part, {})
        tree.places.setdefault(path[:depth], place)
    holder[path[-1]] = value
    stale: list[Path] = [known for known in tree.places if known[: len(path)] == path]
    for known in stale:
        del tree.places[known]
    tree.places[path] = place
