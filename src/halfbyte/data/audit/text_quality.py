"""Texts that are damaged, cut off or in another language, as the cleaning filters see them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any, get_args

from halfbyte.data.audit.private import hidden
from halfbyte.data.audit.subject import EXAMPLES, MANY, Seen, Subject
from halfbyte.data.cleaning.encoding import encoding
from halfbyte.data.cleaning.language import language, languages_of
from halfbyte.data.cleaning.parts import Verdict
from halfbyte.data.cleaning.script import letters_by_script, script
from halfbyte.data.cleaning.unfinished import unfinished
from halfbyte.data.example import Example
from halfbyte.events.types import Found
from halfbyte.recipe.cleaning import (
    EncodingFilter,
    LanguageFilter,
    Script,
    ScriptFilter,
    Unfinished,
)

# Damage and a second language matter in fewer rows than most things do.
SOME = 0.01
# Below this share of the rows no script or language is the file's own.
OWN = 0.6
ENOUGH_LETTERS = 20
TOLD = 300  # rows by which the file's own language is told
TOGETHER = (("Han", "Hiragana", "Katakana"), ("Han", "Bopomofo"), ("Hangul", "Han"))


def find_text_quality(subject: Subject) -> list[Found]:
    """Findings on encoding, unfinished answers, scripts and, if thorough, languages."""
    rows = Seen(subject)
    return [
        *_encoding(subject, rows),
        *_unfinished(subject, rows),
        *_second_language(subject, rows),
    ]


def flagged(subject: Subject, verdicts: Iterable[Verdict]) -> tuple[list[int], list[str]]:
    """Places of the rows looked at that a filter would drop, and why some, private data hidden."""
    places: list[int] = []
    reasons: list[str] = []
    for place, verdict in zip(subject.looked_at, verdicts, strict=True):
        if verdict is not None:
            places.append(place)
            if len(reasons) < EXAMPLES:
                reasons.append(hidden(verdict if isinstance(verdict, str) else verdict[1]))
    return places, reasons


def _encoding(subject: Subject, rows: Sequence[Example]) -> list[Found]:
    places, shown = flagged(subject, encoding(EncodingFilter(filter="encoding"), rows))
    if not places:
        return []
    return [
        subject.found(
            "broken-encoding",
            "warning" if subject.share(places) >= SOME else "note",
            f"{subject.of(places)} hold characters that were damaged when they were stored",
            "read the source again in its own encoding, or let the filter encoding of "
            "data.cleaning repair or drop them",
            places,
            shown,
        )
    ]


def _unfinished(subject: Subject, rows: Sequence[Example]) -> list[Found]:
    places, shown = flagged(subject, unfinished(Unfinished(filter="unfinished"), rows))
    if not places:
        return []
    return [
        subject.found(
            "unfinished-answers",
            "warning" if subject.share(places) >= MANY else "note",
            f"{subject.of(places)} have an answer that breaks off or begins in the middle",
            "look at them, and let the filter unfinished of data.cleaning drop them if they do",
            places,
            shown,
        )
    ]


def _second_language(subject: Subject, rows: Sequence[Example]) -> list[Found]:
    scripts = Counter(name for row in rows if (name := _script(row)) is not None)
    if not scripts:
        return []
    own = _allowed(scripts)
    own_share = sum(scripts[name] for name in own) / scripts.total()
    known: list[Any] = [name for name in own if name in get_args(Script)]
    if own_share < OWN or not known:
        return []
    settings = ScriptFilter(filter="script", allow=known, min_share=0.5)
    places, shown = flagged(subject, script(settings, rows))
    what, name = f"other letters than {known[0]}", "script"
    if subject.thorough and find_spec("py3langid"):
        told = _language(rows)
        if told is not None:
            others, reasons = flagged(
                subject, language(LanguageFilter(filter="language", allow=[told]), rows)
            )
            if len(others) > len(places):
                places, shown = others, reasons
                what, name = f"another language than {told}", "language"
    if not places:
        return []
    return [
        subject.found(
            "second-language",
            "warning" if subject.share(places) >= SOME else "note",
            f"{subject.of(places)} are written in {what}, which the others are in",
            f"let the filter {name} of data.cleaning drop them unless both are meant",
            places,
            shown,
        )
    ]


def _script(row: Example) -> str | None:
    """The script of most letters of a row's answer."""
    text = row.answer
    if text.isascii():
        return "Latin" if len(text) >= ENOUGH_LETTERS else None
    letters = letters_by_script(text)
    return letters.most_common(1)[0][0] if letters.total() >= ENOUGH_LETTERS else None


def _allowed(scripts: Counter[str]) -> tuple[str, ...]:
    """The file's own script, with those that are written beside it."""
    most = scripts.most_common(1)[0][0]
    found = {most}
    for group in TOGETHER:
        if most in group and any(scripts[name] for name in group if name != most):
            found.update(group)
    return (most, *sorted(found - {most}))


def _language(rows: Sequence[Example]) -> str | None:
    """The language of most answers, as an ISO 639 code, if there is one."""
    step = max(1, len(rows) // TOLD)
    answers = [row.answer for row in rows[::step]]
    told = Counter(name for name in languages_of(answers, ENOUGH_LETTERS) if name)
    if not told:
        return None
    name, count = told.most_common(1)[0]
    return name if count >= OWN * told.total() else None
