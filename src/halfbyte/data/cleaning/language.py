"""Rows in another language."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from halfbyte.data.cleaning.parts import Verdict, beginning
from halfbyte.data.cleaning.script import letters_by_script, parts_of
from halfbyte.data.example import Example
from halfbyte.errors import DataError
from halfbyte.recipe.cleaning import LanguageFilter

READ = 1000  # characters of a text: more change nothing and take longer
SURE = 0.5  # so probable is a language that is told; between those much alike it is divided
UNLIKELY = 0.1  # and no more all languages that are allowed
NO_LANGUAGE = "zxx"  # numbers, markup, names of things

NEEDS = (
    "the filter language needs the package py3langid; install it with "
    "pip install 'halfbyte[clean]'."
)


def language(settings: LanguageFilter, examples: Sequence[Example]) -> Iterator[Verdict]:
    """Texts that are surely in a language not allowed, as py3langid tells it.

    Raises DataError where the library is missing, or does not know a language that is allowed.
    """
    identifier = _identifier(settings.allow)
    known = {*settings.allow, NO_LANGUAGE}
    for example in examples:
        verdict = None
        for text in parts_of(example, settings.field):
            beginning_of = text[:READ]
            if letters_by_script(beginning_of).total() < settings.min_letters:
                continue
            ranked = identifier.rank(beginning_of)
            name, probability = ranked[0]
            allowed = sum(share for other, share in ranked if other in known)
            if probability >= SURE and allowed <= UNLIKELY:
                verdict = f"{name}, to {probability:.0%}: {beginning(text)}"
                break
        yield verdict


def languages_of(texts: Iterable[str], min_letters: int) -> Iterator[str | None]:
    """The language that each text is surely in; None where it cannot be told, or has fewer letters.

    Raises DataError where the library is missing.
    """
    identifier = _identifier(())
    for text in texts:
        name, probability = NO_LANGUAGE, 0.0
        if letters_by_script(text[:READ]).total() >= min_letters:
            name, probability = identifier.classify(text[:READ])
        yield name if probability >= SURE and name != NO_LANGUAGE else None


def check_languages(settings: LanguageFilter) -> None:
    """Raises DataError where the library is missing or knows less."""
    _identifier(settings.allow)


def _identifier(languages: Sequence[str]) -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise DataError(NEEDS) from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    unknown = sorted(set(languages) - set(identifier.labels))
    if unknown:
        raise DataError(
            f"the filter language cannot tell {', '.join(unknown)} from others: py3langid has no "
            "such language; write its ISO 639 code, such as en or pt."
        )
    return identifier
