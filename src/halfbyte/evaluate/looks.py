"""How answers look: what a reader sees before reading, and what habits they have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from halfbyte.data.cleaning.unfinished import breaks_off
from halfbyte.data.cleaning.words import count_words

_ITEM = re.compile(r"^\s*(?:[-*+•◦▪‣–]|\(?(?:\d{1,3}|[a-zA-Z])[.)])\s+\S", re.MULTILINE)
_HEADING = re.compile(
    r"^\s{0,3}(?:#{1,6}\s+\S.*|(?:\*\*|__)[^*_\n]+(?:\*\*|__):?\s*)$", re.MULTILINE
)
_BOLD = re.compile(r"(?<![*\w])\*\*(?=\S)[^*\n]+\*\*|(?<!\w)__(?=\S)[^_\n]+__(?!\w)")
# Both in English alone; of other languages nothing is found.
_MACHINE = re.compile(
    r"\b(?:as|i['’]?m|i am|being|just|only) an? (?:\w+ )?"
    r"(?:ai|a\.i\.|artificial intelligence|language model|chatbot|virtual assistant)\b",
    re.IGNORECASE,
)
_PROFESSIONAL = re.compile(
    r"\b(?:consult|see|seek|visit|contact|ask|talk (?:to|with)|speak (?:to|with)|advice of|"
    r"check with|substitute for)\b[^.!?\n]{0,60}?"
    r"\b(?:doctor|physician|gp|dentist|pharmacist|therapist|psychologist|specialist|lawyer|"
    r"attorney|professional|(?:health\s?care|medical) (?:provider|advice|attention|help|care))",
    re.IGNORECASE,
)
# Words of a farewell below the last sentence, as the cleaning of rows has it.
_SIGN_OFF_WORDS = 3


@dataclass(frozen=True)
class Look:
    """What is to be seen of one text."""

    words: int
    list: bool  # two lines or more that are items
    headings: bool  # a line that is one, or nothing but bold
    bold: bool
    says_machine: bool  # "as an AI", in English
    to_professional: bool  # "consult a doctor", in English
    breaks_off: bool  # by its last marks and words, as the filter of unfinished rows tells it
    empty: bool


def look_at(text: str) -> Look:
    """What ``text`` looks like; what it says is of no matter."""
    stripped = text.strip()
    return Look(
        words=count_words(text),
        list=len(_ITEM.findall(text)) > 1,
        headings=bool(_HEADING.search(text)),
        bold=bool(_BOLD.search(text)),
        says_machine=bool(_MACHINE.search(text)),
        to_professional=bool(_PROFESSIONAL.search(text)),
        breaks_off=bool(stripped) and breaks_off(stripped, _SIGN_OFF_WORDS),
        empty=not stripped,
    )


def mean_look(texts: Sequence[str]) -> dict[str, float]:
    """By the names of :class:`Look`: the mean of the words, and the share of texts with each.

    ``words_median`` is the median of the words.
    """
    looks = [asdict(look_at(text)) for text in texts]
    found = {name: sum(look[name] for look in looks) / len(looks) for name in looks[0]}
    ordered = sorted(look["words"] for look in looks)
    middle = len(ordered) // 2
    found["words_median"] = (ordered[middle] + ordered[~middle]) / 2
    return found
