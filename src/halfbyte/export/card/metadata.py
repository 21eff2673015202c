"""The metadata of a card that somebody else wrote, as the hub takes it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from halfbyte.errors import RunError
from halfbyte.export.card.text import front_matter, hub_name

_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_LONGEST = 100_000


def read_metadata(card: str) -> dict[str, Any]:
    """The fields at the head of a card; none where it has no head. Raises ValueError."""
    front = _FRONT.match(card)
    if front is None:
        return {}
    if len(front[1]) > _LONGEST:
        raise ValueError("it is too long")
    try:
        fields = yaml.safe_load(front[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError("it is no YAML") from error
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise ValueError("it is no table")
    return fields


def on_base(card: str, base: str | None, path: Path) -> str:
    """``card`` with its base model named ``base``, where it names another; the text stays.

    A base model that is a path of some machine, which trainers write there and the hub refuses, is
    left out where ``base`` is no name of the hub. ``path`` is where the card lies, for errors.
    Raises RunError for metadata that are no YAML.
    """
    try:
        fields = read_metadata(card)
    except ValueError as error:
        raise RunError(
            f"the metadata at the head of {path} cannot be read ({error}); mend them."
        ) from error
    named = fields.get("base_model")
    wanted = hub_name(base) if base is not None else None
    if wanted is None and _of_hub(named):
        return card
    if named == wanted:
        return card
    kept = {key: value for key, value in fields.items() if key != "base_model"}
    if wanted is not None:
        kept = {"base_model": wanted, **kept}
    elif "base_model_relation" in kept:
        del kept["base_model_relation"]
    front = _FRONT.match(card)
    text = card if front is None else card[front.end() :]
    return "\n".join(front_matter(kept)) + "\n" + text.lstrip("\n")


def _of_hub(named: Any) -> bool:
    """Whether a base model, or each of several, has a name that the hub may know."""
    names = named if isinstance(named, list) else [named]
    return all(isinstance(name, str) and hub_name(name) is not None for name in names)
