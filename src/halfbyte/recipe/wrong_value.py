"""A value that a setting does not take, in one sentence."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any

from halfbyte.recipe.foreign import VALUES
from halfbyte.recipe.settings import Setting, item_sections, sections, settings, wanted
from halfbyte.recipe.yaml_tree import Path, dotted
from halfbyte.redaction import redact

_NUMBER = re.compile(r"\s*[-+]?(\d[\d_,]*\.?\d*|\.\d+)([eE][-+]?\d+)?\s*\Z")
_YES, _NO = ("yes", "on", "y", "1"), ("no", "off", "n", "0")


def wrong_value(path: Path, problem: Any) -> str:
    """What is wrong at ``path``, from pydantic's ``problem``, to follow the file and the line."""
    if problem["type"] == "rule":
        return str(problem["msg"])
    key = ".".join(part for part in path if isinstance(part, str))
    if key in sections():
        return f"{key} is a section; its settings stand under it, indented."
    known, value = settings(), problem["input"]
    if key not in known:  # what stands under a name of the user's own: lora.rank_pattern.q_proj
        name = next(name for name in reversed(known) if key.startswith(f"{name}."))
        takes = wanted(known[name].schema["additionalProperties"])
        return f"{key} must be {takes}, not {shown(value)}."
    setting = known[key]
    if path and isinstance(path[-1], int):
        item = setting.schema.get("anyOf", [setting.schema])[-1]["items"]
        takes = Setting("", "", "", "", False, None, item).wanted
        return f"{dotted(path)} must be {takes}, not {shown(value)}."
    hint = _hint(setting, value)
    end = "" if hint.endswith("?") else "."
    return f"{key} must be {setting.wanted}, not {shown(value)}{hint}{end}"


def shown(value: Any) -> str:
    """A value as the user may have written it."""
    match value:
        case None:
            return "empty"
        case bool():
            return str(value).lower()
        case str():
            value = redact(value)  # before it is cut, or it is no longer seen as a secret
            return f'"{value if len(value) <= 40 else value[:37] + "…"}"'
        case list():
            return "an empty list" if not value else "a list"
        case dict():
            return "a group of settings"
        case float():
            return f"{value:g}" if float(f"{value:g}") == value else repr(value)
        case int():
            return str(value) if abs(value) < 10**30 else "a number of more than 30 digits"
        case _:
            return repr(value)


def _hint(setting: Setting, value: Any) -> str:
    kinds = setting.kinds
    if isinstance(value, str):
        return _text_hint(setting, value, kinds)
    if setting.is_text and isinstance(value, bool | int | float):
        return "; put it in quotes"
    if isinstance(value, float) and "integer" in kinds and "number" not in kinds:
        return f"; write {int(value)}" if value == int(value) else ""
    return ""


def _text_hint(setting: Setting, value: str, kinds: set[str]) -> str:
    plain = value.strip().lower()
    if plain in VALUES.get(setting.key, {}):
        return f"; here that is {VALUES[setting.key][plain]}"
    if "boolean" in kinds and plain in (*_YES, *_NO, "true", "false"):
        return f"; write {'true' if plain in (*_YES, 'true') else 'false'}"
    if kinds & {"number", "integer"} and _NUMBER.match(value):
        return "; write the number alone, without quotes, commas or underscores"
    close = get_close_matches(plain, setting.names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    if item_sections(setting.key):
        return "; write [{filter: NAME}]" if setting.key == "data.cleaning" else ""
    if "array" in kinds:
        return f"; write [{value}]" if re.fullmatch(r"[\w.]+", value) else "; write [a, b]"
    return ""
