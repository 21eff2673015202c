"""A model card's Markdown and its metadata, in which names and objectives stay text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from halfbyte.model.hub import looks_like_hub_name
from halfbyte.redaction import redact

# Control characters but tab and line feed, the marks that turn the direction of writing, line ends
# that are none to Markdown, and halves of surrogate pairs, which JSON can carry.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff"
    "\ud800-\udfff]"
)
_ACTIVE = re.compile(r"([\\`*_\[\]<>|~$&@])")
_LEADING = re.compile(r"^(?:([-+#=])|(\d+)(?=[.)](?:\s|$)))")


def clean(text: str) -> str:
    """``text`` without secrets and without what cannot be seen; line ends are line feeds."""
    return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", redact(text.replace("\r\n", "\n")))


def escape(text: str) -> str:
    """``text`` on one line so that it reads as it is and marks up nothing, in a table neither."""
    line = _ACTIVE.sub(r"\\\1", " ".join(clean(text).split()))
    return _LEADING.sub(lambda found: f"\\{found[1]}" if found[1] else f"{found[2]}\\", line)


def code(text: str) -> str:
    """A code span whatever ``text`` holds, fit for a table's cell."""
    line = " ".join(clean(text).split()) or " "
    fence = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}".replace("|", "\\|")


def fenced(text: str, language: str) -> list[str]:
    """A block of code that ``text`` cannot end."""
    text = clean(text).rstrip("\n")
    fence = "`" * max(3, _longest_run(text) + 1)
    return [f"{fence}{language}", *text.split("\n"), fence, ""]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table of cells that are Markdown already."""
    return [
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def front_matter(fields: Mapping[str, Any]) -> list[str]:
    """The hub's metadata as YAML between two lines of dashes; what is None or empty is left out."""
    given = {key: _cleaned(value) for key, value in fields.items() if value not in (None, [], "")}
    text = yaml.safe_dump(given, allow_unicode=True, sort_keys=False, width=1 << 20)
    return ["---", *text.rstrip("\n").split("\n"), "---", ""]


def hub_name(name: str) -> str | None:
    """``name`` where it is one of the hub's, with its owner; a path of this machine is none."""
    is_one = "/" in name and looks_like_hub_name(name) and not Path(name).exists()
    return name if is_one and not name.lower().endswith(".gguf") else None


def public_name(name: str) -> str:
    """What to call ``name`` to others: of a path its last part, as the rest is this machine's."""
    if hub_name(name) is not None or name.startswith("pypi:"):
        return name
    return Path(name).expanduser().name or "a local folder"


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(clean(value).split())
    if isinstance(value, dict):
        return {key: _cleaned(inside) for key, inside in value.items()}
    return [_cleaned(item) for item in value] if isinstance(value, list) else value


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
