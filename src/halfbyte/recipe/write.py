"""A recipe as YAML that reads back as the same recipe."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml
from yaml.emitter import Emitter
from yaml.representer import SafeRepresenter
from yaml.serializer import Serializer

from halfbyte.recipe.schema import RecipeFields
from halfbyte.recipe.section import Section
from halfbyte.recipe.settings import join, settings
from halfbyte.recipe.yaml_tree import CoreResolver

_WIDTH = 100
_TEXT = "tag:yaml.org,2002:str"


def dump_recipe(recipe: RecipeFields) -> str:
    """All settings of ``recipe``, in the schema's order."""
    return "\n".join(_lines(recipe, "", comments=False)) + "\n"


def commented_recipe(recipe: RecipeFields) -> str:
    """The same with what each setting is written above it: a recipe to start from."""
    head = [
        "# A recipe of halfbyte: what to fine-tune, on which rows, and how.",
        "# auto leaves a choice to halfbyte, which tells what it chose and why; halfbyte recipe",
        "# with this file's name shows all of it.",
        "",
    ]
    return "\n".join([*head, *_lines(recipe, "", comments=True)]) + "\n"


def _lines(section: Section, key: str, *, comments: bool) -> Iterator[str]:
    indent = "  " * (key.count(".") + 1) if key else ""
    for name in type(section).model_fields:
        value, inner = getattr(section, name), join(key, name)
        if isinstance(value, Section):
            if comments and not key:
                yield ""
            if comments and type(value).__doc__:
                yield f"{indent}# {str(type(value).__doc__).splitlines()[0]}"
            yield f"{indent}{name}:"
            yield from _lines(value, inner, comments=comments)
            continue
        if comments:
            text = settings()[inner].description
            for line in textwrap.wrap(text, _WIDTH - len(indent) - 2, break_on_hyphens=False):
                yield f"{indent}# {line}"
        for line in _dump({name: _plain(value)}).rstrip("\n").split("\n"):
            yield f"{indent}{line}" if line else ""


def _plain(value: Any) -> Any:
    """Groups in a list as what was stated of them: what is left out there has its default."""
    if isinstance(value, list):
        return [v.model_dump(exclude_defaults=True) if isinstance(v, Section) else v for v in value]
    return value


class _Dumper(Emitter, Serializer, SafeRepresenter, CoreResolver):
    """Quotes what our reader would not take for text, and what YAML 1.1 would not."""

    def __init__(self, stream: Any) -> None:
        Emitter.__init__(self, stream, width=_WIDTH, allow_unicode=True)
        Serializer.__init__(self, explicit_start=False, explicit_end=False)
        SafeRepresenter.__init__(self, sort_keys=False)
        CoreResolver.__init__(self)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_YAML_1_1: Any = yaml.resolver.Resolver()

# Characters that are escaped, and those that some reader takes for a line break.
_ODD = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = None
    if _ODD.search(text):
        style = '"'
    elif "\n" in text:
        style = "|" if _fits_block(text) else '"'
    elif _YAML_1_1.resolve(yaml.ScalarNode, text, (True, False)) != _TEXT:
        style = "'"
    return dumper.represent_scalar(_TEXT, text, style=style)


def _fits_block(text: str) -> bool:
    """Whether a block scalar holds ``text`` beyond doubt: no blanks at its ends or its lines'."""
    lines = text.removesuffix("\n").split("\n")
    ends = bool(lines[0]) and bool(lines[-1]) and not lines[0][0].isspace()
    return ends and all(line == line.rstrip() for line in lines)


def _represent_list(dumper: _Dumper, values: list[Any]) -> yaml.SequenceNode:
    groups = any(isinstance(value, dict) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=not groups)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)


def _dump(values: dict[str, Any]) -> str:
    stream = io.StringIO()
    dumper = _Dumper(stream)
    try:
        dumper.open()
        dumper.represent(values)
        dumper.close()
    finally:
        dumper.dispose()
    return stream.getvalue()
