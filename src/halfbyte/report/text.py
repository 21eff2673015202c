"""Text from rows and models made safe to write: nothing invisible, nothing that UTF-8 refuses."""

from __future__ import annotations

import re

# Control characters but tab and line feed, and halves of surrogate pairs, which JSON can carry.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def clean(text: str) -> str:
    """``text`` with line feeds for line ends and a visible sign for what cannot be shown."""
    return _CONTROL.sub(_visible, text.replace("\r\n", "\n").replace("\r", "\n"))


def _visible(match: re.Match[str]) -> str:
    number = ord(match.group())
    return chr(0x2400 + number) if number < 0x20 else "\N{REPLACEMENT CHARACTER}"
