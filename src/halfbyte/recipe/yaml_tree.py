"""YAML as plain values, each with the line it stands on.

Recipes are read by the rules of YAML 1.2's core schema and not by PyYAML's YAML 1.1, in which
``2e-4`` is a text, ``no`` is false, ``010`` is 8 and ``12:30`` is 750. Aliases are refused: a
recipe needs none, and a few lines of them can stand for gigabytes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from halfbyte.errors import RecipeError
from halfbyte.redaction import redact

Path = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_MAX_DEPTH = 12  # a recipe is three deep
_LARGEST = 1 << 53  # whole numbers that a float holds exactly; no setting comes near


class CoreResolver(BaseResolver):
    """Which plain scalars are not text: YAML 1.2.2, section 10.3.2."""


for _tag, _pattern, _first in (
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?(\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN",
        list("-+.0123456789"),
    ),
):
    CoreResolver.add_implicit_resolver(_TAG + _tag, re.compile(rf"(?:{_pattern})\Z"), _first)


class _NodeLoader(Reader, Scanner, Parser, Composer, CoreResolver):
    """Composes nodes; nothing is constructed from them but by ``_Reading``."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        CoreResolver.__init__(self)
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise _refusal(
                f"*{event.anchor} is a YAML alias, which recipes do not use; write the value out",
                event.start_mark,
            )
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise _refusal("this is nested too deep for a recipe", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _refusal(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


@dataclass
class Tree:
    """``values``: dicts, lists and scalars; ``places``: where each path stands, in words."""

    values: Any
    places: dict[Path, str] = field(default_factory=dict)

    def place(self, path: Path) -> str:
        """Where ``path`` stands, or where the nearest thing around it does."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "")

    def order(self, path: Path) -> int:
        """How far down ``path`` stands: what is wrong first is told first."""
        while path and path not in self.places:
            path = path[:-1]
        return list(self.places).index(path) if path in self.places else -1


def read_tree(text: str, name: str) -> Tree:
    """The one YAML document of ``text``; ``name`` is the file's, for errors.

    Raises RecipeError with the line for what is not YAML, a key given twice, an alias, a number
    that is not finite, a tag, and a text that could not be written as UTF-8.
    """
    try:
        node = _NodeLoader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_yaml_sentence(error, text, name)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{name}, line {line}: the character {_character(error)!r} may not stand in YAML; "
            "remove it."
        ) from None
    except (ValueError, OverflowError) as error:  # an escape such as "\UFFFFFFFF"
        raise RecipeError(f"{name} is not YAML that can be read: {error}.") from None
    tree = Tree(None, {(): name})
    if node is not None:
        tree.values = _Reading(tree, name).value(node, ())
    return tree


def _yaml_sentence(error: yaml.MarkedYAMLError, text: str, name: str) -> str:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark is not None else 1
    problem = error.problem or "it cannot be read"
    if "'\\t'" in problem or "'\\\\t'" in problem:
        problem = "a tab cannot indent a line; use spaces"
    elif problem.startswith("mapping values are not allowed"):
        problem = "a colon that is not after a key; put the text that holds it in quotes"
    elif problem.startswith("could not find expected ':'"):
        problem = "a key without a colon after it, or a text that is not indented"
    elif problem.startswith("but found another document"):
        return f"{name}, line {line}: a second document begins; a recipe is one document."
    elif "YAML alias" in problem or "nested too deep" in problem:
        return f"{name}, line {line}: {problem}."
    return f"{name}, line {line}: not valid YAML: {problem}."


def _character(error: Any) -> str:
    return chr(error.character) if isinstance(error.character, int) else str(error.character)


class _Reading:
    """Turns nodes into plain values and notes where each stands."""

    def __init__(self, tree: Tree, name: str) -> None:
        self.tree, self.name = tree, name

    def value(self, node: Any, path: Path) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            values = []
            for index, item in enumerate(node.value):
                self.tree.places[(*path, index)] = self._at(item)
                values.append(self.value(item, (*path, index)))
            return values
        return self._scalar(node, path)

    def _at(self, node: Any) -> str:
        return f"{self.name}, line {node.start_mark.line + 1}"

    def _mapping(self, node: Any, path: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.value:
                raise RecipeError(f"{self._at(key_node)}: a key must be a name.")
            key = self._checked_text(key_node)
            inner = (*path, key)
            if key in values:
                raise RecipeError(
                    f"{self._at(key_node)}: {dotted(inner)} is given twice; it stands on "
                    f"{self.tree.places[inner].rsplit(', ', 1)[-1]} already."
                )
            self.tree.places[inner] = self._at(key_node)
            values[key] = self.value(value_node, inner)
        return values

    def _scalar(self, node: Any, path: Path) -> Any:
        text: str = node.value
        kind = str(node.tag).removeprefix(_TAG)
        try:
            if kind == "null":
                return None
            if kind == "bool" and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if kind == "int":
                return self._countable(int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)))
            if kind == "float":
                return self._finite(
                    float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
                )
        except ValueError:
            raise RecipeError(
                f"{self._at(node)}: {dotted(path)} is {_short(text)}, which is not a number that "
                "a setting can take."
            ) from None
        if kind != "str":
            raise RecipeError(
                f"{self._at(node)}: {dotted(path)} has the YAML tag {_short(str(node.tag))}, "
                "which recipes do not use; remove it."
            )
        return self._checked_text(node)

    def _countable(self, number: int) -> int:
        if abs(number) > _LARGEST:
            raise ValueError
        return number

    def _finite(self, number: float) -> float:
        if not math.isfinite(number):
            raise ValueError
        return number

    def _checked_text(self, node: Any) -> str:
        text: str = node.value
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise RecipeError(
                f"{self._at(node)}: the text holds half a character (a lone surrogate), which "
                "cannot be written; remove it."
            ) from None
        return text


def dotted(path: Path) -> str:
    """``("training", "epochs")`` as ``training.epochs``; a number in a list in brackets."""
    words = ""
    for part in path:
        words += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if words else part
    return words or "the recipe"


def _short(text: str) -> str:
    text = redact(text)
    return repr(text if len(text) <= 40 else text[:37] + "…")
