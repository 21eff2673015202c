"""Under what name llama.cpp knows how a byte-level tokenizer splits a text before it merges.

The name follows from the rule that the tokenizer really has, and not from the name of the model.
"""

from __future__ import annotations

import re
from typing import Any

from halfbyte.errors import ModelError
from halfbyte.model.gguf_split import BYTES, CONTRACTIONS, DIGITS, RULES, lacking_bytes

# Of the names of one rule the first.
_BY_RULE = {(rule.steps, rule.whole_words): name for name, rule in reversed(list(RULES.items()))}


def pre_tokenizer_name(backend: dict[str, Any], model: str) -> str:
    """The name of the rule in ``backend``, the JSON of a ``tokenizers`` tokenizer.

    Raises ModelError where llama.cpp has no such rule.
    """
    lacking = lacking_bytes(backend["model"]["vocab"])
    rule = tuple(_parts(backend.get("pre_tokenizer"), lacking))
    found = _BY_RULE.get((rule, bool(backend["model"].get("ignore_merges"))))
    if found is None:
        raise ModelError(
            f"the tokenizer of {model} splits text by a rule that is none of llama.cpp's for "
            f"{', '.join(sorted(_BY_RULE.values()))}, so the file would give other tokens than "
            "were trained: it cannot be exported to GGUF."
        )
    return found


def _parts(node: Any, lacking: str) -> list[str]:
    """The steps of a pre-tokenizer: a regular expression, ``bytes``, ``digits`` or ``other``."""
    if not node:
        return []
    kind = node.get("type")
    if kind == "Sequence":
        return [part for inner in node["pretokenizers"] for part in _parts(inner, lacking)]
    if kind == "ByteLevel" and not node.get("add_prefix_space"):
        return [BYTES] if node.get("use_regex", True) else []
    if kind == "Digits" and node.get("individual_digits"):
        return [DIGITS]
    if kind == "Split" and node.get("behavior") == "Removed" and not node.get("invert"):
        # Of bytes without a token: llama.cpp leaves these out by itself.
        return [] if lacking and node["pattern"].get("Regex") == lacking else ["other"]
    if kind == "Split" and node.get("behavior") == "Isolated" and not node.get("invert"):
        pattern = node["pattern"].get("Regex")
        if pattern is not None:
            return [_spelled(pattern)]
    return ["other"]


def _spelled(pattern: str) -> str:
    """One spelling of rules that are the same."""
    pattern = pattern.replace("'(?i:[sdmt]|ll|ve|re)", CONTRACTIONS)
    return re.sub(r"\\s\+\$\|", "", pattern)
