"""Which layers get an adapter, of what rank and with what factor, by PEFT's rules.

A list holds names: the last part of a layer's name (``q_proj``), the whole name, or a tail of it at
a dot. A string is a regular expression for the whole name (``model\\.layers\\.[0-3]\\..*``). The
keys of ``rank_pattern`` and ``alpha_pattern`` are names or expressions for the end of a name, and
the first that fits counts. What fits no layer is an error: nobody would see that it does nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import TypeVar

from halfbyte.data.expressions import RecipeExpression
from halfbyte.errors import ModelError

ALL_LINEAR = "all-linear"
ENDS = ("embed_tokens", "lm_head")  # which other tools let adapters have
Targets = str | Sequence[str]
V = TypeVar("V")


def choose_targets(
    names: Iterable[str], target_modules: Targets, exclude_modules: Targets = ()
) -> list[str]:
    """Those of ``names`` (linear layers, the head not among them) that get an adapter, in order.

    Raises ModelError, with the names there are, for a target or an exclusion that fits no layer,
    and where nothing is left.
    """
    names = list(names)
    targets = set(names)
    if target_modules != ALL_LINEAR:
        targets = _fitting(names, target_modules, "lora.target_modules")
    excluded = _fitting(names, exclude_modules, "lora.exclude_modules")
    chosen = [name for name in names if name in targets and name not in excluded]
    if not chosen:
        raise ModelError(
            "lora.exclude_modules leaves none of the layers that lora.target_modules names: "
            "nothing would be trained."
        )
    return chosen


def adapter_ranks(
    chosen: Iterable[str], r: int, rank_pattern: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The rank of each of the ``chosen`` layers: ``r`` where no key of ``rank_pattern`` fits."""
    return _by_pattern(list(chosen), r, rank_pattern or {}, "lora.rank_pattern")


def adapter_scales(
    ranks: Mapping[str, int],
    lora_alpha: float,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
) -> dict[str, float]:
    """The factor of each adapter's output: alpha / r, with rsLoRA alpha / √r.

    rsLoRA is Kalajdzievski, 2023, arXiv 2312.03732, theorem 3.2.
    """
    alphas = _by_pattern(list(ranks), lora_alpha, alpha_pattern or {}, "lora.alpha_pattern")
    return {
        name: float(alphas[name]) / (math.sqrt(r) if use_rslora else r) for name, r in ranks.items()
    }


def saved_targets(chosen: Sequence[str], names: Iterable[str]) -> list[str]:
    """What a saved adapter names as its targets, so that PEFT finds ``chosen`` among ``names``.

    The last parts of the names, which other programs expect, where those say it; else all names.
    """
    names = list(names)
    leaves = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    return leaves if choose_targets(names, leaves) == list(chosen) else list(chosen)


def fits(name: str, target: str, key: str, *, pattern: bool) -> bool:
    """Whether ``target``, a name or a pattern out of the setting ``key``, fits ``name``."""
    return _full_matches(target, [name], key)[0] if pattern else _is_named(name, target)


def _fitting(names: Sequence[str], wanted: Targets, key: str) -> set[str]:
    if isinstance(wanted, str):
        found = set(compress(names, _full_matches(wanted, names, key)))
        if not found:
            raise ModelError(
                f"{key} is the pattern {wanted!r}, which must fit the whole name of a layer and "
                f"fits none; a name here is {names[0]}."
            )
        return found
    for target in wanted:
        if not any(_is_named(name, target) for name in names):
            if target in ENDS:
                raise ModelError(
                    f"{key} names {target!r}, which gets no adapter; to train all of it write "
                    f"lora.modules_to_save: [{target}]."
                )
            raise ModelError(
                f"{key} names {target!r}, which this model does not have; it has {_leaves(names)}."
            )
    return {name for name in names if any(_is_named(name, target) for target in wanted)}


def _by_pattern(
    names: Sequence[str], default: V, patterns: Mapping[str, V], key: str
) -> dict[str, V]:
    matched = {pattern: _end_matches(pattern, names, key) for pattern in patterns}
    fits = {name: [p for p in patterns if matched[p][at]] for at, name in enumerate(names)}
    for pattern in patterns:
        if not any(pattern in found for found in fits.values()):
            raise ModelError(
                f"{key} has {pattern!r}, which fits no layer that gets an adapter; those are "
                f"{_leaves(names)}."
            )
    return {name: patterns[found[0]] if found else default for name, found in fits.items()}


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _full_matches(pattern: str, names: Sequence[str], key: str) -> list[bool]:
    return _matches(pattern, pattern, names, key)


def _end_matches(pattern: str, names: Sequence[str], key: str) -> list[bool]:
    return _matches(rf"(.*\.)?({pattern})", pattern, names, key)


def _matches(expression: str, pattern: str, names: Sequence[str], key: str) -> list[bool]:
    """Which of ``names`` are matched, found in the worker process: the recipe may be anybody's."""
    try:
        re.compile(pattern)  # by itself: in brackets a wrong one may be right
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelError(
            f"{key} has {pattern!r}, which is no regular expression: {error}."
        ) from error
    return RecipeExpression(expression, key).matches(names)


def _leaves(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
