"""Rows whose characters were damaged when they were stored."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from halfbyte.data.cleaning.parts import Verdict, around, changed, messages_of
from halfbyte.data.example import Example
from halfbyte.errors import DataError
from halfbyte.recipe.cleaning import EncodingFilter

NEEDS = (
    "the filter encoding needs the package ftfy to repair; install it with "
    "pip install 'halfbyte[clean]', or leave repair out to drop such rows."
)

# Bytes 0x80 to 0xBF, which go on a character of UTF-8, as Windows-1252 and Latin-1 show them.
_NEXT = "€ƒ†‡ˆ‰Š‹ŒŽ•–—˜™š›œžŸ‘’‚“”„…\x80-\xbf"
# Those of them that do not close a quotation or a thought, as may follow a letter in sound text.
_NO_END = "€ƒ†‡ˆ‰ŠŒŽ•–˜™šœžŸ‚„‹\x80-\xba\xbc-\xbf"
_END = "‘’“”›»…—"
_SMALL = "[a-zß-öø-ÿ]"
_DAMAGED = re.compile(
    "\ufffd"
    # Control characters but tab, line feed, form feed and carriage return; code points that are no
    # characters; half a surrogate pair; a byte order mark inside.
    "|[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]"
    "|(?<!^)\ufeff"
    "|ï»¿|ï¿½"
    # Two bytes: accented letters. A mark that closes something may follow such a capital in sound
    # text, but no small letter stands right before the capital or after the mark.
    f"|[ÂÃÄÅ][{_NO_END}]|(?<={_SMALL})[ÂÃÄÅ][{_END}]|[ÂÃÄÅ][{_END}](?={_SMALL})"
    # Other letters of two bytes, and those of three: one may be chance, two in a row are not.
    f"|(?:[Ä-ß][{_NEXT}]){{2}}|(?:[à-ï][{_NEXT}]{{2}}){{2}}"
    # Quotes, dashes and the like, which begin with 0xE2; emoji, with 0xF0 0x9F.
    f"|â(?:€[{_NEXT}\x9d]|[†‡ˆ‰„š›œž][{_NEXT}])|ð(?:Ÿ|\x9f)[{_NEXT}]{{2}}"
)


def encoding(settings: EncodingFilter, examples: Sequence[Example]) -> Iterator[Verdict]:
    """Drops what is damaged; with ``repair`` mends it if nothing damaged is left then.

    Raises DataError where ftfy is asked for and missing.
    """
    mend = _mender() if settings.repair else None
    for example in examples:
        match = damage(example, settings)
        if match is None:
            yield None
            continue
        shown = around(match.string, *match.span())
        if mend is not None:
            mended = changed(example, settings.field, mend)
            if damage(mended, settings) is None:
                yield mended, shown
                continue
        yield shown


def damage(example: Example, settings: EncodingFilter) -> re.Match[str] | None:
    """The first damaged characters, None where there are none."""
    texts = (text for text in messages_of(example, settings.field) if not text.isascii())
    return next(filter(None, map(_DAMAGED.search, texts)), None) or _control(example, settings)


def check_ftfy() -> None:
    """Raises DataError where the library is missing."""
    _mender()


def _control(example: Example, settings: EncodingFilter) -> re.Match[str] | None:
    texts = messages_of(example, settings.field)
    return next(filter(None, map(_ASCII_CONTROL.search, texts)), None)


_ASCII_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")


def _mender() -> Callable[[str], str]:
    try:
        import ftfy
        from ftfy.fixes import remove_control_chars
    except ImportError:
        raise DataError(NEEDS) from None
    fix: Any = ftfy.fix_encoding

    def mend(text: str) -> str:
        return str(remove_control_chars(fix(text)))

    return mend
