"""Jinja templates of models and recipes, in the sandbox.

The sandbox keeps a template away from everything but what it is given. It does not keep it from
taking all time and memory: see :mod:`halfbyte.data.template_process`, whose worker imports this
file and little else. Chat templates get here what transformers gives them; a test compares the two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

Mark = tuple[int, int]


class ChatTemplate:
    """A chat template at work. Raises what Jinja does for one that is none."""

    def __init__(self, source: str) -> None:
        self._marks: list[Mark] | None = None
        self._blocks: list[str] = []
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(
            raise_exception=_raise, strftime_now=_now, dict=_Dict(), namespace=_Namespace
        )
        environment.extend(generation_seen=self._seen)
        self._template = environment.from_string(source)

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        generate: bool,
        special: Mapping[str, Any],
    ) -> str:
        """What is written of ``messages``, with ``generate`` up to where an answer begins."""
        return self._template.render(**_given(messages, tools, generate, special))

    def text_and_marks(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        special: Mapping[str, Any],
    ) -> tuple[str, list[Mark]]:
        """The text, and the characters of it that lie in ``{% generation %}`` blocks."""
        self._marks, self._blocks = [], []
        try:
            for block in self._template.generate(**_given(messages, tools, False, special)):
                self._blocks.append(block)
            return "".join(self._blocks), self._marks
        finally:
            self._marks = None

    def _seen(self, text: str) -> None:
        """A ``{% generation %}`` block with ``text`` in it follows what was written so far."""
        if self._marks is not None:
            begin = sum(map(len, self._blocks))
            self._marks.append((begin, begin + len(text)))


def _given(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    generate: bool,
    special: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "messages": messages,
        "tools": [dict(tool) for tool in tools] or None,
        "documents": None,
        "add_generation_prompt": generate,
        **special,
    }


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` … ``{% endgeneration %}`` around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("_write")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _write(self, caller: Any) -> str:
        text: str = caller()
        self.environment.generation_seen(text)  # type: ignore[attr-defined]
        return text


class _Dict:
    """``dict`` without the class, which could be climbed."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """``namespace`` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]  # so that `namespace(self=…)` works too
        values = dict(*args, **kwargs)
        for name in values:
            _require_public(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r} begins with an underscore")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


class RowTemplate:
    """A template of the recipe, which makes a text of a row's cells.

    Of the table's ``columns`` a row may lack some: what is not there is an empty text.
    """

    def __init__(self, source: str, columns: Sequence[str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, finalize=_nothing_is_empty
        )
        self._template = environment.from_string(source)
        self._blank = dict.fromkeys(columns)

    def text(self, cells: Mapping[str, Any]) -> str:
        if len(cells) < len(self._blank):
            cells = {**self._blank, **cells}
        return self._template.render({"row": cells, **cells})


def _nothing_is_empty(value: Any) -> Any:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else value
