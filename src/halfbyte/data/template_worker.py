"""The process in which templates and expressions of strangers run, with limits and no secrets.

It reads requests from standard input and writes answers to standard output, each a length of eight
bytes and so many bytes: requests pickled by its parent, answers as JSON, which it could write
whatever it likes into. It can open no file for writing, start no process (unless it is root's), has
none of its parent's secrets in its environment, and a limit of memory and, for each request, of
time. The first argument is the number of a pipe that gets a byte for each part of a request done.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from halfbyte.data.expression import Expression
from halfbyte.data.jinja_sandbox import ChatTemplate, RowTemplate

MEMORY = 512 << 20  # bytes more than it begins with
SECONDS = 20  # of the processor, for a request
LONGEST = 32 << 20  # characters of one text
TOO_MUCH = "memory"


def main() -> None:
    """Answer requests until there are no more."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what prints, prints elsewhere
    progress = int(sys.argv[1])
    templates: dict[str, Any] = {}
    _limit()
    while (request := _read(requests)) is not None:
        _more_time()
        answer = json.dumps(_answer(request, templates, lambda: os.write(progress, b".")))
        answers.write(struct.pack("<Q", len(answer)) + answer.encode("ascii"))
        answers.flush()


def _answer(request: Any, templates: dict[str, Any], done: Callable[[], object]) -> list[Any]:
    kind, key, work = request
    if kind == "open":
        return [_tried(lambda: templates.__setitem__(key, _made(**work)))]
    found = []
    for one in work:
        found.append(_tried(lambda one=one: _rendered(templates, key, one)))  # type: ignore[misc]
        done()
    return found


def _made(**work: Any) -> Any:
    if "expression" in work:
        return Expression(**work)
    return RowTemplate(**work) if "columns" in work else ChatTemplate(**work)


def _rendered(templates: dict[str, Any], key: Any, work: Any) -> Any:
    if isinstance(key, tuple):  # the templates of a row, each under its name
        return {name: _named(name, templates[one], work) for name, one in key}
    template = templates[key]
    if isinstance(template, Expression):
        return template.of(*work)
    conversations, tools, generate, marks, special = work
    if marks:
        text, spans = template.text_and_marks(conversations[0], tools, special)
        return [_short(text)], spans
    return [_short(template.text(c, tools, generate, special)) for c in conversations], []


class _Named(Exception):
    """What a template of several raised, with its name."""


def _named(name: str, template: RowTemplate, cells: Any) -> str:
    try:
        return _short(template.text(cells))
    except MemoryError:
        raise
    except Exception as error:
        raise _Named(f"{name} {type(error).__name__}", str(error)) from error


def _short(text: str) -> str:
    if len(text) > LONGEST:
        raise MemoryError
    return text


def _tried(call: Callable[[], Any]) -> Any:
    """``["made", result]``, or why there is none: a class, what it says, the template's line."""
    try:
        return ["made", call()]
    except MemoryError:
        return [TOO_MUCH]
    except _Named as error:
        kind, words = error.args
        return [kind, words[:2000], None]
    except Exception as error:  # a template computes, and so raises, whatever it likes
        return [type(error).__name__, str(error)[:2000], getattr(error, "lineno", None)]


def _read(file: BinaryIO) -> Any:
    head = file.read(8)
    if len(head) < 8:
        return None
    return pickle.loads(file.read(struct.unpack("<Q", head)[0]))  # of its parent


def _limit() -> None:
    pages = int(open("/proc/self/statm", encoding="ascii").read().split()[0])  # noqa: SIM115
    memory = pages * resource.getpagesize() + MEMORY
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _more_time() -> None:
    """SECONDS from now on; a process that takes more is ended by the system."""
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + SECONDS + 1, most))


if __name__ == "__main__":
    main()
