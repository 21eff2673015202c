"""Every setting of a recipe by its dotted key, and in words what it takes.

The loader's errors, the settings reference and ``halfbyte recipe`` all speak of settings; what
they say comes from here, and here it comes from the models of ``schema``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args, get_origin

from halfbyte.recipe.schema import RecipeFields
from halfbyte.recipe.section import Section


@dataclass(frozen=True)
class Setting:
    """One key that takes a value.

    ``section`` is the dotted key of its section, empty at the top level; ``schema`` its part of
    the JSON schema.
    """

    key: str
    section: str
    name: str
    description: str
    required: bool
    default: Any
    schema: dict[str, Any]

    @property
    def wanted(self) -> str:
        """What it takes, to follow "must be": ``a number above 0, or auto``."""
        return wanted(self.schema)

    @property
    def kinds(self) -> set[str]:
        """JSON types that it takes: string, number, integer, boolean, array, null."""
        return {str(part.get("type")) for part in _alternatives(self.schema)}

    @property
    def names(self) -> list[str]:
        """The words among its values: ``["cosine", "linear", "constant"]``."""
        return [value for value in literals(self.schema) if isinstance(value, str)]

    @property
    def is_text(self) -> bool:
        """Whether it takes any text, and nothing else but null."""
        return self.kinds <= {"string", "null"} and not self.names


@cache
def settings() -> dict[str, Setting]:
    """All settings by key, in the schema's order."""
    return {setting.key: setting for setting in _walk(RecipeFields, "")}


@cache
def sections() -> dict[str, type[Section]]:
    """All sections by key, the top level ("") first."""
    return {"": RecipeFields, **dict(_sections(RecipeFields, ""))}


@cache
def item_sections(key: str) -> tuple[type[Section], ...]:
    """What each item of the list at ``key`` may be, where its items are groups of settings."""
    section, _, name = key.rpartition(".")
    if section not in sections() or name not in sections()[section].model_fields:
        return ()
    annotation = sections()[section].model_fields[name].annotation
    return tuple(_leaves(annotation)) if get_origin(annotation) is list else ()


def tag_of(section: type[Section]) -> str | None:
    """The name by which a list tells this kind of group from others, such as a filter's."""
    field = section.model_fields.get("filter")
    names = get_args(field.annotation) if field is not None else ()
    return str(names[0]) if names else None


def settings_of(section: type[Section]) -> list[Setting]:
    """What one group of settings takes, its own groups included; keys begin in it."""
    return list(_walk(section, ""))


def names_in(section: str) -> list[str]:
    """What may stand in a section: its settings and its own sections."""
    return list(sections()[section].model_fields)


def join(*parts: str) -> str:
    """The dotted key of its parts; empty ones are passed over."""
    return ".".join(part for part in parts if part)


def get(recipe: RecipeFields, key: str) -> Any:
    """The value of the setting ``key`` in ``recipe``."""
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def is_stated(recipe: RecipeFields, key: str) -> bool:
    """Whether whoever made ``recipe`` gave ``key`` a value, be it the default's own."""
    section: Any = recipe
    *above, name = key.split(".")
    for part in above:
        if part not in section.model_fields_set:
            return False
        section = getattr(section, part)
    return name in section.model_fields_set


def wanted(schema: dict[str, Any]) -> str:
    """What values a part of the JSON schema takes, in words."""
    parts = _alternatives(schema)
    if any(part.get("type") == "number" for part in parts):  # a number is whole where it likes
        parts = [part for part in parts if part.get("type") != "integer"]
    words: list[str] = []
    for part in parts:
        words += _words(part)
    if len(words) <= 2:
        return (", or " if any(" " in word for word in words) else " or ").join(words)
    return ", ".join(words[:-1]) + " or " + words[-1]


def _words(part: dict[str, Any]) -> list[str]:
    literals = _literals(part)
    if literals:
        return [str(value) for value in literals]
    match part.get("type"):
        case "null":
            return ["null"]
        case "boolean":
            return ["true", "false"]
        case "integer":
            return [f"a whole number{_bounds(part)}"]
        case "number":
            return [f"a number{_bounds(part)}"]
        case "array":
            return [f"a list of {_items_in_words(part.get('items', {}))}"]
        case "object":
            return [f"names, each with {wanted(part['additionalProperties'])}"]
        case _:
            return ["text that is not empty" if part.get("minLength") else "text"]


def _items_in_words(items: dict[str, Any]) -> str:
    if "discriminator" in items:  # groups of several kinds, which one key tells apart
        return f"{items['discriminator']['propertyName']}s"
    if "$ref" in items:
        return "groups of settings"
    return "whole numbers" if items.get("type") in ("integer", "number") else "names"


def _bounds(part: dict[str, Any]) -> str:
    low, above = part.get("minimum"), part.get("exclusiveMinimum")
    high, below = part.get("maximum"), part.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    if low is not None and below is not None:
        return f" of at least {low:,g} and below {int(below) if below == int(below) else below:,}"
    if low is not None:
        return f" of at least {low:g}"
    if above is not None and high is not None:
        return f" above {above:g} and at most {high:g}"
    return f" above {above:g}" if above is not None else ""


def literals(schema: dict[str, Any]) -> list[Any]:
    """The words and other single values that a part of the JSON schema takes."""
    return [value for part in _alternatives(schema) for value in _literals(part)]


def _alternatives(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return list(schema.get("anyOf", [schema]))


def _literals(part: dict[str, Any]) -> list[Any]:
    return list(part.get("enum", [part["const"]] if "const" in part else []))


def _sections(model: type[Section], above: str) -> Iterator[tuple[str, type[Section]]]:
    for name, field in model.model_fields.items():
        inner = _section(field.annotation)
        if inner is not None:
            key = join(above, name)
            yield key, inner
            yield from _sections(inner, key)


def _walk(model: type[Section], above: str) -> Iterator[Setting]:
    properties = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        key = join(above, name)
        inner = _section(field.annotation)
        if inner is not None:
            yield from _walk(inner, key)
            continue
        yield Setting(
            key=key,
            section=above,
            name=name,
            description=field.description or "",
            required=field.is_required(),
            default=None if field.is_required() else field.get_default(call_default_factory=True),
            schema=properties[name],
        )


def _leaves(annotation: Any) -> Iterator[type[Section]]:
    inside = _section(annotation)
    if inside is not None:
        yield inside
        return
    for part in get_args(annotation):
        yield from _leaves(part)


def _section(annotation: Any) -> type[Section] | None:
    inside = isinstance(annotation, type) and issubclass(annotation, Section)
    return annotation if inside else None
