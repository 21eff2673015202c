"""Figures as text, each kind formatted in one place.

Files and weights are counted in decimal units (1 MB = 10⁶ bytes, 1 GB = 10⁹), working memory in
binary ones (1 GiB = 2³⁰), as the tools that report them do.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

NONE = "–"  # what a table shows where there is no value
MINUS = "\N{MINUS SIGN}"
NBSP = "\N{NO-BREAK SPACE}"  # between a figure and its unit


def count(number: float) -> str:
    """A whole number with its thousands apart."""
    return f"{number:,.0f}".replace("-", MINUS)


def many(number: int, one: str, more: str | None = None) -> str:
    """``3 rows``, ``1 row``."""
    return f"{count(number)}{NBSP}{one if number == 1 else more or one + 's'}"


def loss(value: float | None) -> str:
    """A loss in nats to four digits."""
    if value is None:
        return NONE
    return f"{value:.4f}".replace("-", MINUS) if math.isfinite(value) else not_finite(value)


def difference(value: float) -> str:
    """A difference of two losses with its sign."""
    if not math.isfinite(value):
        return not_finite(value)
    text = f"{abs(value):.4f}"
    if float(text) == 0.0:
        return text
    return f"{'+' if value > 0 else MINUS}{text}"


def not_finite(value: float) -> str:
    return "not a number" if math.isnan(value) else "infinite"


def percentage(part: float, whole: float) -> str:
    """``part`` of ``whole`` in per cent to two digits after the point."""
    if not whole or not math.isfinite(part) or not math.isfinite(whole):
        return NONE
    exact = Decimal(part) * 100 / Decimal(whole)
    if abs(exact) >= 10**12:
        return f"{float(exact):.3g}{NBSP}%".replace("-", MINUS)
    rounded = exact.quantize(Decimal("0.01"), rounding=ROUND_HALF_UP)
    if exact and not rounded:
        return f"<{NBSP}0.01{NBSP}%"
    return f"{rounded:,}{NBSP}%".replace("-", MINUS)


def size(number: float) -> str:
    """Bytes of a file or of weights."""
    if not math.isfinite(number):
        return not_finite(number)
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(number) >= unit * 0.9995:
            value = number / unit
            return f"{value:.{_digits(value)}f}{NBSP}{name}".replace("-", MINUS)
    return many(round(number), "byte")


def gib(number: float) -> str:
    """Bytes of working memory."""
    return f"{number / 2**30:.2f}{NBSP}GiB"


def duration(seconds: float) -> str:
    """A stretch of time, in the two units that matter."""
    if not math.isfinite(seconds):
        return not_finite(seconds)
    if seconds < 0.01:
        return f"0{NBSP}s" if seconds == 0 else f"<{NBSP}0.01{NBSP}s"
    if seconds < 9.95:
        return f"{seconds:.2g}{NBSP}s" if seconds < 0.1 else f"{seconds:.1f}{NBSP}s"
    if seconds < 59.5:
        return f"{seconds:.0f}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest:02d}{NBSP}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours}{NBSP}h {minutes:02d}{NBSP}min"
    return f"{hours // 24}{NBSP}days {hours % 24}{NBSP}h"


def joules(energy: float) -> str:
    return _scaled(energy, "J")


def watt_hours(energy: float) -> str:
    """Joules in the unit of an electricity meter."""
    return _scaled(energy / 3600, "Wh")


def rate(value: float) -> str:
    """A learning rate or another small number: the shortest of ``0.0002`` and ``2e-05``."""
    if not math.isfinite(value):
        return not_finite(value)
    return f"{value:.4g}".replace("-0", "-").replace("e-", f"e{MINUS}")


def speed(tokens: float, seconds: float) -> str:
    """Tokens a second."""
    if seconds <= 0:
        return NONE
    value = tokens / seconds
    return f"{count(value) if value >= 100 else f'{value:.1f}'}{NBSP}tokens/s"


def choices(loss_in_nats: float) -> str:
    """exp(loss): among how many equally likely tokens a choice would be as uncertain."""
    if not math.isfinite(loss_in_nats):
        return NONE
    if loss_in_nats > math.log(1e6):
        return "over a million"
    value = math.exp(loss_in_nats)
    return count(value) if value >= 100 else f"{value:.1f}"


def moment(seconds: float) -> str:
    """A time of day, in UTC so that a report reads the same wherever it is made."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def setting(value: Any) -> str:
    """A recipe's value as YAML would show it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:g}"
    if isinstance(value, dict):  # one of a list of groups, such as a filter
        said = [f"{name}: {setting(v)}" for name, v in value.items() if v is not None]
        return f"{{{', '.join(said)}}}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {setting(v)}" for key, v in value.items()) or "none"
    if isinstance(value, list | tuple):
        groups = any(isinstance(v, dict) for v in value)
        return ("; " if groups else ", ").join(setting(v) for v in value) or "none"
    return str(value).replace("\n", "\\n")


def _digits(value: float) -> int:
    return 0 if abs(value) >= 999.5 else 1 if abs(value) >= 9.995 else 2


def _scaled(value: float, unit: str) -> str:
    for factor, prefix in ((1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.{_digits(value / factor)}f}{NBSP}{prefix}{unit}"
    return f"{value:.{_digits(value)}f}{NBSP}{unit}"
