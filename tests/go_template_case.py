"""The part of Go's text/template that a Modelfile uses, evaluated slowly and plainly."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_ACTION = re.compile(r"\{\{(- )?(.*?)( -)?\}\}", re.DOTALL)
_WORD = re.compile(r'\s*("(?:[^"\\]|\\.)*"|\(|\)|:=|=|,|[^\s(),]+)')


def go_render(template: str, data: dict[str, Any]) -> str:
    """``template`` executed with ``data``; names are those of its keys."""
    pieces = list(_lexed(template))
    nodes, rest = _parsed(pieces, 0)
    assert rest == len(pieces), pieces[rest:]
    scope: dict[str, Any] = {"$": data}
    return _run(nodes, data, scope)


def ollama_data(messages: list[dict[str, str]], system: str = "") -> dict[str, Any]:
    """What Ollama gives a template: all messages, and the system messages as one text."""
    if system and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": system}, *messages]
    said = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    return {
        "System": said,
        "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages],
    }


def _lexed(template: str) -> Iterator[tuple[str, str]]:
    at, trim = 0, False
    for found in _ACTION.finditer(template):
        text = template[at : found.start()]
        text = text.lstrip() if trim else text
        yield "text", text.rstrip() if found[1] else text
        yield "action", found[2].strip()
        at, trim = found.end(), bool(found[3])
    text = template[at:]
    yield "text", text.lstrip() if trim else text


def _parsed(pieces: list[tuple[str, str]], at: int) -> tuple[list[Any], int]:
    """Nodes up to an ``else`` or ``end``, and where that stands."""
    nodes: list[Any] = []
    while at < len(pieces):
        kind, text = pieces[at]
        if kind == "text":
            nodes.append(("text", text))
            at += 1
            continue
        word = text.split(None, 1)[0] if text else ""
        if word in ("else", "end"):
            return nodes, at
        if word in ("if", "range"):
            node, at = _block(pieces, at, word, text.split(None, 1)[1])
            nodes.append(node)
        else:
            nodes.append(("do", _words(text)))
            at += 1
    return nodes, at


def _block(pieces: list[tuple[str, str]], at: int, word: str, test: str) -> tuple[Any, int]:
    body, at = _parsed(pieces, at + 1)
    otherwise: list[Any] = []
    closing = pieces[at][1]
    if closing.startswith("else if"):
        inner, at = _block(pieces, at, "if", closing.removeprefix("else if").strip())
        return (word, _words(test), body, [inner]), at
    if closing == "else":
        otherwise, at = _parsed(pieces, at + 1)
    assert pieces[at][1] == "end", pieces[at]
    return (word, _words(test), body, otherwise), at + 1


def _words(text: str) -> list[str]:
    words = _WORD.findall(text)
    assert "".join(words) == re.sub(r'\s+(?=(?:[^"]*"[^"]*")*[^"]*$)', "", text), text
    return words


def _run(nodes: list[Any], dot: Any, scope: dict[str, Any]) -> str:
    out = ""
    for node in nodes:
        if node[0] == "text":
            out += node[1]
        elif node[0] == "do":
            words = node[1]
            if len(words) > 1 and words[1] in (":=", "="):
                assert words[1] == ":=" or words[0] in scope, words
                scope[words[0]] = _value(words[2:], dot, scope)
            else:
                value = _value(words, dot, scope)
                out += str(value)
        elif node[0] == "if":
            out += _run(node[2] if _value(node[1], dot, scope) else node[3], dot, scope)
        else:
            words = node[1]
            names = [w for w in words[: words.index(":=")] if w != ","] if ":=" in words else []
            items = _value(words[words.index(":=") + 1 :] if names else words, dot, scope)
            for number, item in enumerate(items):
                if names:
                    scope[names[-1]] = item
                if len(names) == 2:
                    scope[names[0]] = number
                out += _run(node[2], item, scope)
    return out


def _value(words: list[str], dot: Any, scope: dict[str, Any]) -> Any:
    values, rest = _operands(words, dot, scope)
    assert not rest, rest
    head, *arguments = values
    if not callable(head):
        assert not arguments, words
        return head
    return head(*arguments)


def _operands(words: list[str], dot: Any, scope: dict[str, Any]) -> tuple[list[Any], list[str]]:
    found: list[Any] = []
    while words:
        word, *words = words
        if word == ")":
            return found, words
        if word == "(":
            inner, words = _operands(words, dot, scope)
            found.append(inner[0](*inner[1:]) if callable(inner[0]) else inner[0])
        else:
            found.append(_operand(word, dot, scope))
    return found, []


def _operand(word: str, dot: Any, scope: dict[str, Any]) -> Any:
    functions = {
        "eq": lambda a, *others: any(a == b for b in others),
        "ne": lambda a, b: a != b,
        "and": lambda *values: next((v for v in values if not v), values[-1]),
        "or": lambda *values: next((v for v in values if v), values[-1]),
        "not": lambda value: not value,
        "len": len,
        "slice": lambda items, *at: items[slice(*(at if len(at) > 1 else (at[0], None)))],
    }
    if word in functions:
        return functions[word]
    if word in ("true", "false"):
        return word == "true"
    if word.startswith('"'):
        return word[1:-1].encode().decode("unicode_escape")
    if re.fullmatch(r"-?\d+", word):
        return int(word)
    variable, *keys = word.split(".")
    value = dot if not variable else scope[variable]
    for key in keys:
        if key:
            value = value[key]
    return value
