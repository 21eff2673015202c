"""Likely private data: where it stands in a text, and the text with it hidden.

Only what can be told by its form is looked for. What has check digits must pass them (cards:
Luhn, ISO/IEC 7812; IBAN: ISO 13616; CPF, DNI, NHS and Chinese identity numbers: their countries'
own), and a plain number needs a word before it that says what it is. So lengths, doses, dates and
laboratory values are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

HIDDEN = "•"

EMAIL, PHONE, CARD, IBAN = "e-mail address", "phone number", "card number", "bank account (IBAN)"
IDENTITY, RECORD = "identity number", "patient or record number"
KINDS = (EMAIL, PHONE, CARD, IBAN, IDENTITY, RECORD)


@dataclass(frozen=True)
class Private:
    """``text[start:end]`` is likely to be of the kind ``kind``."""

    kind: str
    start: int
    end: int


def find_private(text: str) -> list[Private]:
    """What in ``text`` is likely private, in order, none overlapping."""
    found = [*_emails(text), *_ibans(text)]
    for run in _RUN.finditer(text):
        found += _in_run(text, run.start(), run.end())
    found.sort(key=lambda one: (one.start, -one.end))
    apart: list[Private] = []
    for one in found:
        if not apart or one.start >= apart[-1].end:
            apart.append(one)
    return apart


def hidden(text: str) -> str:
    """``text`` with what is likely private hidden, of the same length.

    Of an e-mail address the first letter and the domain's end stay, of a number its last two
    digits: enough to find the place again by.
    """
    parts, last = [], 0
    for one in find_private(text):
        parts += [text[last : one.start], _hide(one, text[one.start : one.end])]
        last = one.end
    return "".join([*parts, text[last:]]) if parts else text


def _hide(one: Private, text: str) -> str:
    if one.kind == EMAIL:
        name, _, domain = text.partition("@")
        host, dot, top = domain.rpartition(".")
        return name[0] + HIDDEN * (len(name) - 1) + "@" + HIDDEN * len(host) + dot + top
    signs = sum(c.isalnum() for c in text)
    kept, left = [], signs
    for c in text:
        left -= c.isalnum()
        kept.append(HIDDEN if c.isalnum() and left >= 2 else c)
    return "".join(kept)


# ---- addresses ----------------------------------------------------------------------------------

_NAME = re.compile(r"[A-Za-z0-9_.+%-]{1,64}$")
_DOMAIN = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.){1,8}[A-Za-z]{2,24}(?![\w@])")
# Kept free for examples by RFC 2606.
_EXAMPLE = re.compile(r"(?:^|\.)(?:example(?:\.(?:com|org|net))?|test|invalid|localhost)$", re.I)


def _emails(text: str) -> Iterator[Private]:
    at = text.find("@")
    while at >= 0:
        name = _NAME.search(text, max(0, at - 64), at)
        domain = _DOMAIN.match(text, at + 1)
        if name and domain and not _EXAMPLE.search(domain[0]):
            yield Private(EMAIL, name.start(), domain.end())
        at = text.find("@", at + 1)


_IBAN = re.compile(r"[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")


def _ibans(text: str) -> Iterator[Private]:
    for match in _IBAN.finditer(text):
        if match.start() and text[match.start() - 1].isalnum():
            continue
        code = match[0].replace(" ", "")
        if 15 <= len(code) <= 34:
            turned = code[4:] + code[:4]
            if int("".join(str(int(c, 36)) for c in turned)) % 97 == 1:
                yield Private(IBAN, match.start(), match.end())


# ---- numbers ------------------------------------------------------------------------------------

# Seven signs and more of digits and what stands between them: all numbers below lie in one. So long
# that it holds several, and not longer, since what has no digit at its end is tried anew.
_RUN = re.compile(r"[\d(+][\d ().\-/]{5,96}\d")

_CARD = re.compile(r"(?<!\d)[3-6]\d{3}(?:[ -]?\d){9,15}(?!\d)")
_SSN = re.compile(r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\d-])")
_CPF = re.compile(r"(?<!\d)\d{3}\.\d{3}\.\d{3}-\d\d(?!\d)")
_CHINESE = re.compile(r"(?<!\d)[1-9]\d{5}(?:19|20)\d{9}[\dXx](?![\dA-Za-z])")
_DNI = re.compile(r"(?<!\d)\d{8}-?[A-HJ-NP-TV-Z](?![A-Za-z0-9])")
_NHS = re.compile(r"(?<!\d)\d{3}[ -]?\d{3}[ -]?\d{4}(?!\d)")
# With the country's code, in up to so many groups: as many as have no more digits than any number.
_ABROAD = [
    re.compile(rf"\+\d{{1,3}}(?:[ .\-]?\(\d{{1,5}}\))?(?:[ .\-]?\d{{1,5}}){{1,{groups}}}(?!\d)")
    for groups in range(6, 0, -1)
]
_PHONES = (
    # North America: (212) 555-0187, 212-555-0187, 212.555.0187
    re.compile(
        r"(?<![\d.\-/])(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[.-])[2-9]\d\d[ .-]\d{4}(?![\d-])"
    ),
    # Britain: 020 7946 0018, 0161 496 0123, 07700 900123
    re.compile(r"(?<![\d.\-/])0(?:2\d \d{4} \d{4}|\d{3} \d{3} \d{4}|\d{4} ?\d{6})(?![\d-])"),
    re.compile(r"(?<![\d.\-/])0[1-9](?:[ .-]\d\d){4}(?!\d|[.\-/]\d)"),  # France: 01 99 00 27 53
    re.compile(r"(?<![\d.\-/])0\d{2,4}[/-]\d{5,8}(?!\d)"),  # Germany: 030/23125014
)
# Anybody may call these: not private.
_FREE = re.compile(r"^\+?1?[ .-]?\(?8(?:00|33|44|55|66|77|88)\D")

_LABELLED = re.compile(r"\(?\d[\d ().\-/]*\d")
_PHONE_WORDS = re.compile(
    r"(?:\b(?:tele)?phone|\btel|\bmobile|\bmob|\bcell|\bfax|\bwhats ?app|\bcontact|\bmy number|"
    r"\bcall(?: me| us)?(?: at| on)?|\breach(?: me| us)? (?:at|on))"
    r"(?: ?(?:numbers?|nos?|num|is)\b)*\W{0,4}$",
    re.IGNORECASE,
)
_RECORD_WORDS = re.compile(
    r"(?:\bMRN|\b(?:medical record|patient|hospital|insurance|passport|member|case) ?"
    r"(?:id|nos?|numbers?|num)\b|\bpassport)(?: ?is)?[\W_]{0,4}$",
    re.IGNORECASE,
)
_NHS_WORD = re.compile(r"\bNHS\b[^\d]{0,16}$", re.IGNORECASE)
_BEFORE = 32


def _in_run(text: str, start: int, end: int) -> Iterator[Private]:
    """What lies in the run of digits ``text[start:end]``; letters of its last sign behind it."""
    wide = text[max(0, start - 1) : end + 2]
    shift = max(0, start - 1)
    taken = False
    for kind, pattern, valid in _CHECKED:
        for match in pattern.finditer(wide):
            if valid(match[0]):
                taken = True
                yield Private(kind, shift + match.start(), shift + match.end())
    if taken:
        return
    before = text[max(0, start - _BEFORE) : start]
    label = RECORD if _RECORD_WORDS.search(before) else None
    if label is None and _PHONE_WORDS.search(before):
        label = PHONE
    if label is not None:
        first = _LABELLED.match(text, start, end)
        if first and 5 <= len(_digits(first[0])) <= 15 and (label == RECORD or _dials(first[0])):
            yield Private(label, first.start(), first.end())
            return
    if _NHS_WORD.search(before):
        for match in _NHS.finditer(text, start, end):
            if _nhs(match[0]):
                yield Private(IDENTITY, match.start(), match.end())
                return
    abroad = wide.find("+")
    while abroad >= 0:
        for pattern in _ABROAD:
            number = pattern.match(wide, abroad)
            if number and 9 <= len(_digits(number[0])) <= 15 and not _FREE.match(number[0]):
                yield Private(PHONE, shift + number.start(), shift + number.end())
                break
        abroad = wide.find("+", abroad + 1)
    for pattern in _PHONES:
        for match in pattern.finditer(wide):
            if 9 <= len(_digits(match[0])) <= 15 and not _FREE.match(match[0]):
                yield Private(PHONE, shift + match.start(), shift + match.end())


def _digits(text: str) -> list[int]:
    return [int(c) for c in text if c.isdecimal()]


def _dials(text: str) -> bool:
    """Whether a number after such a word can be dialled, and is not everybody's."""
    return len(_digits(text)) >= 7 and not _FREE.match(text)


def _luhn(text: str) -> bool:
    digits = _digits(text)
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    doubled = [
        d if at % 2 == 0 else (2 * d - 9 if d > 4 else 2 * d)
        for at, d in enumerate(reversed(digits))
    ]
    return sum(doubled) % 10 == 0


def _cpf(text: str) -> bool:
    digits = _digits(text)
    if len(set(digits)) == 1:
        return False
    for known in (9, 10):
        rest = sum(d * (known + 1 - at) for at, d in enumerate(digits[:known])) * 10 % 11 % 10
        if rest != digits[known]:
            return False
    return True


def _chinese(text: str) -> bool:
    rest = sum(int(c) * pow(2, 17 - at, 11) for at, c in enumerate(text[:17])) % 11
    return "10X98765432"[rest] == text[17].upper()


def _dni(text: str) -> bool:
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(text[:8]) % 23] == text[-1]


def _nhs(text: str) -> bool:
    digits = _digits(text)
    check = 11 - sum(d * (10 - at) for at, d in enumerate(digits[:9])) % 11
    return check % 11 == digits[9]


_CHECKED = (
    (CARD, _CARD, _luhn),
    (IDENTITY, _SSN, lambda text: True),
    (IDENTITY, _CPF, _cpf),
    (IDENTITY, _CHINESE, _chinese),
    (IDENTITY, _DNI, _dni),
)
