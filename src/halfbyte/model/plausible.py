"""Figures of a configuration that no model has, refused before anything is made of them.

transformers writes lists as long as some of them say when it reads a configuration, and makes as
many modules when it builds a model: a file of a few bytes could take all memory there is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from halfbyte.errors import ModelError

# The largest models have 126 layers, 384 experts in each, and a vocabulary of 300,000 tokens.
MOST_LAYERS = 10_000
MOST_LISTED = 1_000_000  # labels, experts, heads, groups: there are lists of these
MOST = 1 << 40
_LAYERS = ("layers", "n_layer", "blocks", "block_count", "depth")
_LISTED = ("label", "expert", "head", "group", "codebook")


def require_plausible(settings: Any, where: str) -> None:
    """Raise ModelError for a number in ``settings`` (values as JSON has them) that cannot be.

    ``where`` is the file, for the error.
    """
    for key, number in _numbers(settings, ""):
        name = key.lower()
        most = MOST
        if name.endswith(_LAYERS):
            most = MOST_LAYERS
        elif any(word in name for word in _LISTED):
            most = MOST_LISTED
        if isinstance(number, int) and abs(number) > most:
            raise ModelError(f"{where} says {key} = {_short(number)}, which no model has.")
        if isinstance(number, float) and abs(number) > most and number.is_integer():
            raise ModelError(f"{where} says {key} = {number:g}, which no model has.")


def require_layers(config: Any, tensors: int, name: str) -> None:
    """Raise ModelError where ``config`` has more layers than the weights of ``name`` tensors."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > tensors:
        raise ModelError(
            f"the configuration of {name} speaks of {layers:,} layers and its weights are "
            f"{tensors:,} tensors: the two do not fit each other."
        )


def _numbers(value: Any, key: str) -> Iterator[tuple[str, int | float]]:
    """The numbers in ``value``, each under the nearest name above it."""
    waiting = [(key, value)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(str(name), inner) for name, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(key, inner) for inner in value]
        elif isinstance(value, bool):
            continue
        elif isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
            yield key, value


def _short(number: int) -> str:
    digits = str(abs(number))
    return (
        f"{number:,}" if len(digits) < 16 else f"{'-' * (number < 0)}{digits[0]}e{len(digits) - 1}"
    )
