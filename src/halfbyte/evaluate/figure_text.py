"""The figures of an evaluation as text, the same in a terminal and in a report."""

from __future__ import annotations

import math

from halfbyte.evaluate.paired import p_text
from halfbyte.evaluate.resampling import Estimate
from halfbyte.evaluate.results import Figure

MINUS = "\N{MINUS SIGN}"
NONE = "–"
NBSP = "\N{NO-BREAK SPACE}"
GROUPS = {
    "answer_tokens": "answers' tokens",
    "all_tokens": "all tokens",
    "answers": "greedy answers",
    "choices": "choices",
}
LOOKS = {
    "words": "words, mean",
    "words_median": "words, median",
    "tokens": "tokens, mean",
    "list": "with a list",
    "headings": "with headings",
    "bold": "with bold",
    "says_machine": "“I'm an AI”",
    "to_professional": "“consult a doctor”",
    "breaks_off": "break off",
    "unfinished": "cut by the limit",
    "empty": "empty",
}
_NUMBERS = ("words", "words_median", "tokens")


def value_text(figure: Figure, value: float | None) -> str:
    """A value of ``figure``: a loss to three digits, a share in per cent."""
    if value is None or not math.isfinite(value):
        return NONE
    if figure.kind == "share":
        return f"{100 * value:.1f}{NBSP}%"
    return f"{value:,.{_digits(figure)}f}".replace("-", MINUS)


def interval_text(figure: Figure, estimate: Estimate) -> str:
    """``41.2 % (38.9–43.0)``: a value and the interval it is in; the value alone without one."""
    value = value_text(figure, estimate.value)
    if estimate.low is None or estimate.high is None:
        return value
    ends = [value_text(figure, end).removesuffix(f"{NBSP}%") for end in _ends(estimate)]
    return f"{value} ({'–'.join(ends)})"


def difference_text(figure: Figure) -> str:
    """``−0.030 (−0.051, −0.012)``: adapter − base and its interval; of shares in points."""
    value = _signed(figure, figure.difference.value)
    if figure.difference.low is None or figure.difference.high is None:
        return value
    return f"{value} ({', '.join(_signed(figure, end) for end in _ends(figure.difference))})"


def chance_text(figure: Figure) -> str:
    """``real, p < 0.001`` or ``chance? p = 0.41``, for where there is little room."""
    p = p_text(figure.chance.p)
    return f"real, {p}" if figure.chance.real else f"chance? {p}"


def look_text(key: str, value: float | None) -> str:
    """A mean number of words or tokens, or a share of the texts."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.1f}" if key in _NUMBERS else f"{100 * value:.0f}{NBSP}%"


def _ends(estimate: Estimate) -> list[float]:
    return [end for end in (estimate.low, estimate.high) if end is not None]


def _signed(figure: Figure, value: float) -> str:
    if not math.isfinite(value):
        return NONE
    value = 100 * value if figure.kind == "share" else value
    text = f"{abs(value):,.{1 if figure.kind == 'share' else _digits(figure)}f}"
    if not any(digit in text for digit in "123456789"):
        return text
    return f"{'+' if value > 0 else MINUS}{text}"


def _digits(figure: Figure) -> int:
    """Behind the point: the same for all values of a figure, so that they can be compared."""
    if figure.kind != "factor":
        return 3
    largest = max(abs(figure.base.value), abs(figure.adapter.value))
    return 0 if largest >= 1000 else 1 if largest >= 100 else 2
