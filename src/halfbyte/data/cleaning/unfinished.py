"""Answers that break off, or that begin in the middle.

The rules use what scripts have in common, marks and capitals, and no words of any language. They
are meant to let a finished answer pass: of one that breaks off after a full stop nothing shows.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

from halfbyte.data.cleaning.parts import Verdict, beginning, ending
from halfbyte.data.cleaning.script import script_of
from halfbyte.data.cleaning.words import count_words
from halfbyte.data.example import Example
from halfbyte.recipe.cleaning import Unfinished

# Of the answers whose first letter has a case, so many begin with a capital where all should.
CAPITALS = 0.9
# An answer of so few words needs no mark at its end: a name, a phrase, a sentence left bare.
PHRASE = 12
# Lines from which on a text may be verse, code or a table, whose lines end in no marks.
LINES = 3

_FINAL = ".!?…‼⁇⁈⁉。！？｡．؟۔।॥։՞܀።፧፨၊။៕។᠃᠉‽"
_SENTENCE = re.compile(rf"[{_FINAL}][\"'”’»)\]*_」』）]*(?=\s|$)|[。！？।॥።။]")
_OPEN = frozenset(",;:،؛、，；：﹐·–—-‐‑‒―&([{«“‘„‚「『（【《〈<")
_CONTINUES = frozenset(",;:!?)]}»、。，：；！？）】」』،؛")
_FENCE = re.compile(r"^\s{0,3}(```|~~~)", re.MULTILINE)
_ITEM = re.compile(r"^\s*(?:[-*+•◦▪‣–—]|\(?\w{1,3}[.)]|#{1,6}|>)\s+\S")
# Neither has marks of sentences.
_BARE_SCRIPTS = frozenset({"Thai", "Lao", "Khmer"})


def unfinished(settings: Unfinished, examples: Sequence[Example]) -> Iterator[Verdict]:
    """What the assistant says, message by message, and of plain texts the text."""
    capitals = settings.start == "upper"
    if settings.start == "auto":
        capitals = _begin_with_capitals(settings, examples)
    for example in examples:
        verdict = None
        for text in answers_of(example):
            if breaks_off(text, settings.sign_off_words):
                verdict = f"ends: {ending(text)}"
            elif begins_in_the_middle(text, capitals=capitals):
                verdict = f"begins: {beginning(text)}"
            if verdict:
                break
        yield verdict


def answers_of(example: Example) -> list[str]:
    """The texts that should be whole; what is said beside a call of a tool need not."""
    if example.text is not None:
        return [example.text.strip()] if example.text.strip() else []
    return [
        message.content.strip()
        for message in example.messages
        if message.role == "assistant" and not message.tool_calls and message.content.strip()
    ]


def breaks_off(text: str, sign_off_words: int) -> bool:
    """Whether ``text``, without blanks at its ends, stops before its end."""
    if len(_FENCE.findall(text)) % 2:
        return True
    last = text[-1]
    if last == ";" and _is_greek(text):  # it asks a question there
        return False
    lines = [line for line in text.splitlines() if line.strip()]
    if last in _OPEN:
        greets = last == "," and not _ITEM.match(lines[-1])  # "Best wishes,"
        return not (greets and _is_farewell(text[:-1], sign_off_words))
    if not unicodedata.category(last).startswith(("L", "M")):
        return False  # a mark, a bracket or quote that closes, a figure, an emoji
    if script_of(last) in _BARE_SCRIPTS or _bare_script(text):
        return False
    if _ITEM.match(lines[-1]) or "|" in lines[-1]:
        return False
    bare = sum(unicodedata.category(line.rstrip()[-1]).startswith(("L", "M")) for line in lines)
    if len(lines) >= LINES and 2 * bare >= len(lines):
        return False
    if not _SENTENCE.search(text):
        return count_words(text) > PHRASE
    return not _is_farewell(text, sign_off_words)


def begins_in_the_middle(text: str, *, capitals: bool) -> bool:
    """Whether ``text`` begins with a mark that closes something, or in a word.

    A small letter is taken for the latter if answers begin with ``capitals``; not so in texts
    like ``iPhone`` and ``x = 5``.
    """
    first = text[0]
    if first in _CONTINUES:
        return True
    if first == ".":
        return text[1:2].isspace()
    if not capitals or not first.islower():
        return False
    word = re.split(r"[\s.,;:!?]", text, maxsplit=1)[0]
    if len(word) == 1:
        return text[1:].lstrip()[:1].isalpha()
    return word.isalpha() and word.islower()


def _begin_with_capitals(settings: Unfinished, examples: Sequence[Example]) -> bool:
    """Of the answers that do not break off, so that the filter finds the same a second time."""
    upper = cased = 0
    for example in examples:
        texts = answers_of(example)
        if any(breaks_off(text, settings.sign_off_words) for text in texts):
            continue
        for text in texts:
            upper += text[0].isupper()
            cased += text[0].isupper() or text[0].islower()
    return cased > 0 and upper >= CAPITALS * cased


def _is_farewell(text: str, most: int) -> bool:
    """Whether few words, the first with a capital where there are any, follow a sentence."""
    ends = [match.end() for match in _SENTENCE.finditer(text)]
    breaks = text.rfind("\n") + 1
    rest = text[max([*ends, breaks]) :].strip()
    return bool(rest) and not rest[0].islower() and count_words(rest) <= most


def _is_greek(text: str) -> bool:
    letters = [character for character in text[-200:] if character.isalpha()]
    return bool(letters) and script_of(letters[-1]) == "Greek"


def _bare_script(text: str) -> bool:
    """Whether the last letter is a vowel sign or mark of a script without marks of sentences."""
    name = unicodedata.name(text[-1], "").split(" ", 1)[0].title()
    return name in _BARE_SCRIPTS
