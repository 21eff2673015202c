"""Figures as a person reads them."""

from __future__ import annotations

import time
import unicodedata

_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def bytes_text(count: float) -> str:
    """1.25 GB, 59.7 MB, 812 kB: decimal units, three digits."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            figure = count / size
            return f"{figure:.{2 if figure < 10 else 1 if figure < 100 else 0}f} {unit}"
    return f"{count:.0f} bytes"


def count_text(count: int) -> str:
    """134.5 M, 1.10 B: parameters; exact below 100,000."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


def duration_text(seconds: float) -> str:
    """0.34 s, 12 s, 2 min 31 s, 1 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def hour_text(at: float) -> str:
    """14:32, with the day where that is not today; ``at`` in unix seconds, local time."""
    then, now = time.localtime(at), time.localtime()
    same_day = (then.tm_year, then.tm_yday) == (now.tm_year, now.tm_yday)
    return time.strftime("%H:%M" if same_day else "%a %H:%M", then)


def rate_text(per_second: float) -> str:
    """Tokens a second."""
    figure = f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.1f}"
    return f"{figure} tokens/s"


def value_text(value: object) -> str:
    """A setting's value as one types it in a recipe."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(value_text(item) for item in value) or "none"
    return str(value)


def visible(text: str) -> str:
    """``text`` with control characters spelled out, for text that came from a file or a model.

    A terminal would obey an escape sequence in a row of data, and a mark that turns the direction
    of writing would hide what stands there. Line feeds and tabs stay.
    """
    return "".join(
        (f"\\x{ord(c):02x}" if ord(c) < 0x100 else f"\\u{ord(c):04x}") if _obeyed(c) else c
        for c in text
    )


def _obeyed(c: str) -> bool:
    if c in "\n\t":
        return False
    # Half a surrogate pair, which JSON can hold, is none that a terminal could be sent.
    return unicodedata.category(c) in ("Cc", "Cs") or c in _DIRECTIONS


def shortened(text: str, limit: int) -> str:
    """``text`` with its middle left out where it is longer than ``limit`` characters."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} […{len(text) - 2 * half:,} characters…] {text[-half:]}"
