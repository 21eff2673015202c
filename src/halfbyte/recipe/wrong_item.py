"""What is wrong with a group of settings in a list, such as a filter of ``data.cleaning``."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from halfbyte.recipe.section import Section
from halfbyte.recipe.settings import item_sections, literals, tag_of, wanted
from halfbyte.recipe.wrong_value import shown
from halfbyte.recipe.yaml_tree import Path, dotted

FEW = 12  # names that an error lists


def item_path(path: Path) -> Path | None:
    """The beginning of ``path`` that names a group in a list; None where there is none."""
    for at, step in enumerate(path):
        if isinstance(step, int) and item_sections(".".join(map(str, path[:at]))):
            return path[: at + 1]
    return None


def wrong_item(path: Path, problem: Any) -> str:
    """What is wrong at ``path``, in a list of groups, from pydantic's ``problem``."""
    item = item_path(path) or path
    kinds = item_sections(".".join(map(str, item[:-1])))
    names = [name for name in map(tag_of, kinds) if name is not None]
    match problem["type"]:
        case "item":
            name = problem["ctx"]["name"]
            place = path if not name or path[-1] == name else (*path, name)
            return f"{dotted(place)} {problem['msg']}"
        case "union_tag_invalid":
            tag = problem["ctx"]["tag"]
            return f"{dotted((*item, 'filter'))} must be {_either(names)}, not {_told(tag, names)}"
        case "union_tag_not_found":
            return f"{dotted(item)} needs its `filter`: {_either(names)}."
        case _:
            pass
    inside = path[len(item) :]
    if not inside and problem["type"] != "missing":
        hint = f"; write `filter: {problem['input']}`" if problem["input"] in names else ""
        return f"{dotted(item)} must be a group of settings, not {shown(problem['input'])}{hint}."
    kind = next((k for k in kinds if tag_of(k) in problem["loc"]), kinds[0])
    return _wrong_inside(item, inside, kind, problem)


def _wrong_inside(above: Path, inside: Path, kind: type[Section], problem: Any) -> str:
    """The same for the settings of one group, of the type ``kind``, and of groups in it."""
    if problem["type"] == "missing" and not inside:
        name = str(problem["loc"][-1])
        return f"{dotted(above)} needs {name}: {_lower(kind.model_fields[name].description)}"
    place, name = (*above, *inside), str(inside[0])
    field = kind.model_fields.get(name)
    if field is None:
        close = get_close_matches(name, kind.model_fields, n=1, cutoff=0.6)
        end = f"did you mean {close[0]}?" if close else f"{_takes(kind)}."
        return f"{dotted(place)} is not a setting of {tag_of(kind) or 'such a group'}; {end}"
    inner = field.annotation
    if isinstance(inner, type) and issubclass(inner, Section):
        if len(inside) > 1 or problem["type"] == "missing":
            return _wrong_inside((*above, name), inside[1:], inner, problem)
        return f"{dotted(place)} is a section; its settings stand under it, indented."
    schema = kind.model_json_schema()["properties"][name]
    if isinstance(inside[-1], int):
        schema = schema.get("anyOf", [schema])[0]["items"]
    known = [value for value in literals(schema) if isinstance(value, str)]
    many = f"one of {len(known)} names, such as {', '.join(known[:3])}"
    takes = many if len(known) > FEW else wanted(schema)
    return f"{dotted(place)} must be {takes}, not {_told(problem['input'], known)}"


def _told(value: Any, names: Sequence[str]) -> str:
    """The value and the name that was perhaps meant, to end the sentence."""
    close = get_close_matches(value.lower(), names, n=1, cutoff=0.6) if _is_text(value) else []
    close = close or [name for name in names if _is_text(value) and name.lower() == value.lower()]
    return f"{shown(value)}; did you mean {close[0]}?" if close else f"{shown(value)}."


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _either(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" or {names[-1]}"


def _takes(kind: type[Section]) -> str:
    return f"it takes {', '.join(name for name in kind.model_fields if name != 'filter')}"


def _lower(sentence: str | None) -> str:
    text = sentence or "it has no default."
    return text[:1].lower() + text[1:]
