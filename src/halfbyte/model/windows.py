"""Sliding windows made short for a moment, so that a few tokens show how a model uses them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SHORT = 8
# A model may count the token itself or not.
_APART = 1
# What a configuration calls them; chunks are blocks of the sequence that see nothing of each other.
_NAMES = ("sliding_window", "attention_chunk_size")


@contextmanager
def short_windows(network: Any) -> Iterator[None]:
    """Let ``network`` (of transformers) see no further than 8 tokens back wherever it slides.

    transformers' masks follow the configuration at each pass, while attentions mostly keep a copy
    that they were made with; both are changed, and put back at the end. A model whose windows
    stand in its masks alone, which our attention never sees, differs then from its own plain
    attention within a few tokens, as it otherwise would from its window's length on.
    """
    owners = {id(m.config): m.config for m in network.modules() if hasattr(m, "config")}
    changed: list[tuple[Any, str, int]] = []
    for name in _NAMES:
        there = [getattr(owner, name, None) for owner in owners.values()]
        sizes = {size for size in there if isinstance(size, int) and size > SHORT}
        for owner in [*owners.values(), *network.modules()]:
            size = getattr(owner, name, None)
            for true in sizes:
                if isinstance(size, int) and abs(size - true) <= _APART:
                    changed.append((owner, name, size))
                    setattr(owner, name, SHORT + size - true)
                    break
    try:
        yield
    finally:
        for owner, name, size in changed:
            setattr(owner, name, size)
