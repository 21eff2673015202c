"""The words of a text, whatever the script."""

from __future__ import annotations

import re
import unicodedata

# Scripts that put no space between words: a character counts as a word. Kana and ideographs.
WIDE = (
    "\u3005-\u3007\u3041-\u309f\u30a1-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9d\U00020000-\U000323af"
)
_WIDE = re.compile(f"[{WIDE}]")

# Marks of sentences and quotes. Brackets and the signs of calculations stay: 5 - 3 is not 5 / 3.
_MARKS = re.compile(
    r"[\s.,;:!?\"'`"
    "¡¿«»‘’‚‛“”„‟‹›…·"
    "\u3001\u3002\u300c-\u300f\u30fb\uff01\uff0c\uff0e\uff1a\uff1b\uff1f\uff61-\uff65"
    "\u060c\u061b\u061f\u06d4\u0964\u0965\u1362-\u1368\u104a\u104b\u17d4\u17d5\u0589\u055c-\u055e"
    "]+"
)


def words_of(text: str) -> list[str]:
    """The words of ``text`` as they are compared: without case, marks of sentences and quotes."""
    if not text.isascii():
        text = _WIDE.sub(r" \g<0> ", unicodedata.normalize("NFKC", text))
    return _MARKS.sub(" ", text.casefold()).split()


def normalized(text: str) -> str:
    """``text`` for comparing: what differs in case, spaces, quotes and marks alone is equal."""
    return " ".join(words_of(text))


def count_words(text: str) -> int:
    """Runs between white space; each ideograph and kana is one of its own."""
    if text.isascii():
        return len(text.split())
    return len(_WIDE.sub(" x ", text).split())
