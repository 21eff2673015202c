"""By what a saved adapter's product is multiplied, as PEFT reads it out of adapter_config.json."""

from __future__ import annotations

import math
import re
from typing import Any

from halfbyte.data.expressions import RecipeExpression
from halfbyte.errors import ModelError
from halfbyte.model.adapter_files import CONFIG, SavedAdapter

# Such a key is a name: as an expression it cannot take long, so that no other process has to try.
_NAME = re.compile(r"[\w.\-]+")


def saved_scales(saved: SavedAdapter) -> dict[str, float]:
    """The factor of B·A of each layer of ``saved``, by the layer's full name.

    alpha / r, or alpha / √r with rsLoRA (Kalajdzievski, 2023, arXiv 2312.03732), where the keys of
    ``rank_pattern`` and ``alpha_pattern`` are expressions for the end of a layer's name and the
    first that fits counts. Raises ModelError for settings that are no numbers and for a rank that
    is not that of the layer's matrices; DataError for a pattern that is no expression.
    """
    config, names = saved.config, list(saved.layers)
    ranks = _by_pattern(names, config, "r", "rank_pattern")
    alphas = _by_pattern(names, config, "lora_alpha", "alpha_pattern")
    found = {}
    for name, (a, _) in saved.layers.items():
        rank, alpha = ranks[name], alphas[name]
        if rank != len(a):
            raise ModelError(
                f"{CONFIG} gives the layer {name} rank {rank:g} and its matrices have rank "
                f"{len(a)}: the adapter is damaged, or its configuration is another's."
            )
        found[name] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return found


def _by_pattern(
    names: list[str], config: dict[str, Any], default: str, patterns: str
) -> dict[str, float]:
    keys = config.get(patterns) or {}
    if not isinstance(keys, dict):
        raise ModelError(f"{CONFIG} has {patterns} that are no table, which PEFT does not take.")
    found: dict[str, float] = {}
    for key, value in keys.items():
        matched = _matched(key, names, patterns)
        for name, fits in zip(names, matched, strict=True):
            if fits and name not in found:
                found[name] = _number(value, patterns)
    left = [name for name in names if name not in found]
    if left:
        number = _number(config.get(default), default)
        found |= dict.fromkeys(left, number)
    return found


def _matched(key: str, names: list[str], setting: str) -> list[bool]:
    expression = rf"(.*\.)?({key})"
    if _NAME.fullmatch(key):
        return [re.fullmatch(expression, name) is not None for name in names]
    return RecipeExpression(expression, f"{CONFIG}'s {setting}").matches(names)


def _number(value: object, setting: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ModelError(f"{CONFIG} has a value of {setting} that is no number above 0.")
    return float(value)
