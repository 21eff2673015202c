"""How a byte-level tokenizer splits a text before it merges, by the name that llama.cpp knows.

llama.cpp has the rules themselves in its code and a file names one of them; under a wrong name the
model gets other tokens than it learned, and nothing says so. The name follows from the rule that
the tokenizer really has, and not from the name of the model.
"""

from __future__ import annotations

import re
from typing import Any

from halfbyte.errors import ModelError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{end}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{end}"
)
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_TEKKEN = _CASED.replace("{end}", "") + rf"|\p{{N}}|{_SLASHED}"
_GPT4O = _CASED.replace("{end}", f"{_CONTRACTIONS}?") + rf"|\p{{N}}{{1,3}}|{_SLASHED}"

# The rule, and whether a word that is a token is taken whole, whatever the merges say.
_BY_RULE = {
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
    (("bytes",), False): "gpt-2",
    (("digits", "bytes"), False): "smollm",
}
# Names under which llama.cpp takes a word that is a token whole.
WHOLE_WORDS = ("llama-bpe", "tekken")


def pre_tokenizer_name(backend: dict[str, Any], model: str) -> str:
    """The name of the rule in ``backend``, the JSON of a ``tokenizers`` tokenizer.

    Raises ModelError where llama.cpp has no such rule.
    """
    rule = tuple(_parts(backend.get("pre_tokenizer")))
    found = _BY_RULE.get((rule, bool(backend["model"].get("ignore_merges"))))
    if found is None:
        raise ModelError(
            f"the tokenizer of {model} splits text by a rule that is none of llama.cpp's for "
            f"{', '.join(sorted(_BY_RULE.values()))}, so the file would give other tokens than "
            "were trained: it cannot be exported to GGUF."
        )
    return found


def _parts(node: Any) -> list[str]:
    """The steps of a pre-tokenizer: a regular expression, ``bytes``, ``digits`` or ``other``."""
    if not node:
        return []
    kind = node.get("type")
    if kind == "Sequence":
        return [part for inner in node["pretokenizers"] for part in _parts(inner)]
    if kind == "ByteLevel" and not node.get("add_prefix_space"):
        return ["bytes"] if node.get("use_regex", True) else []
    if kind == "Digits" and node.get("individual_digits"):
        return ["digits"]
    if kind == "Split" and node.get("behavior") == "Isolated" and not node.get("invert"):
        pattern = node["pattern"].get("Regex")
        if pattern is not None:
            return [_spelled(pattern)]
    return ["other"]


def _spelled(pattern: str) -> str:
    """One spelling of rules that are the same."""
    pattern = pattern.replace("'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS)
    return re.sub(r"\\s\+\$\|", "", pattern)
