"""Rows that are written in other scripts."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache

from halfbyte.data.cleaning.parts import Verdict, beginning, part
from halfbyte.data.example import Example
from halfbyte.recipe.cleaning import Part, ScriptFilter

LATIN = "Latin"
OTHER = "other"
SYMBOLS = 2  # so many letters of other scripts may be symbols: a β, the Ω of a resistance

# The first word of a letter's Unicode name is its script, but for these.
_NAMES = {"CJK": "Han", "IDEOGRAPHIC": "Han", "NKO": "NKo", "KELVIN": LATIN, "ANGSTROM": LATIN}
_NAMES |= {"OHM": "Greek", "HENTAIGANA": "Hiragana", "TURNED": LATIN, "ROMAN": LATIN}
# Letters that texts of any script use: µ, ª, º, ʼ, 𝐱, ℝ.
_ANY = frozenset(
    {
        *("MICRO", "FEMININE", "MASCULINE", "MODIFIER", "MATHEMATICAL", "DOUBLE-STRUCK", "SCRIPT"),
        *("BLACK-LETTER", "PLANCK", "EULER", "ALEF", "BET", "GIMEL", "DALET", "INFORMATION"),
    }
)
_FORMS = ("FULLWIDTH", "HALFWIDTH", "SUPERSCRIPT", "SUBSCRIPT")


@cache
def script_of(character: str) -> str | None:
    """The script of a letter by its Unicode name; None for what no script alone has."""
    if not character.isalpha():
        return None
    words = unicodedata.name(character, "").split()
    if len(words) > 1 and words[0] in _FORMS:
        words = words[1:]
    if not words or words[0] in _ANY:
        return None
    return _NAMES.get(words[0], words[0].title())


def letters_by_script(text: str) -> Counter[str]:
    """Letters of ``text`` by their script."""
    if text.isascii():
        return Counter({LATIN: sum(map(str.isalpha, text))})
    letters: Counter[str] = Counter()
    for character, count in Counter(text).items():
        script = script_of(character)
        if script is not None:
            letters[script] += count
    return letters


def script(settings: ScriptFilter, examples: Sequence[Example]) -> Iterator[Verdict]:
    """Texts with too many letters of scripts that are not allowed; those without letters stay."""
    allowed = frozenset[str](settings.allow)
    for example in examples:
        verdict = None
        for text in parts_of(example, settings.field):
            if LATIN in allowed and text.isascii():
                continue
            letters = letters_by_script(text)
            total = letters.total()
            foreign = total - sum(letters[name] for name in allowed)
            if foreign > SYMBOLS and total - foreign < settings.min_share * total:
                most = max((n for n in letters if n not in allowed), key=lambda n: letters[n])
                verdict = f"{letters[most] / total:.0%} {most}: {beginning(text)}"
                break
        yield verdict


def parts_of(example: Example, field: Part) -> list[str]:
    """The question, the answer, or one after the other."""
    if field != "row":
        return [part(example, field)]
    return [part(example, "question"), part(example, "answer")]
