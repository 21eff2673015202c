"""How a byte-level tokenizer splits a text before it merges, by the names that llama.cpp knows.

llama.cpp has the rules themselves in its code, and a GGUF file names one of them in
``tokenizer.ggml.pre``. Under a wrong name a model gets other tokens than it learned.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{end}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{end}"
)
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_TEKKEN = _CASED.replace("{end}", "") + rf"|\p{{N}}|{_SLASHED}"
_GPT4O = _CASED.replace("{end}", f"{CONTRACTIONS}?") + rf"|\p{{N}}{{1,3}}|{_SLASHED}"

# Steps of a rule that are no regular expression: GPT-2's own, and each digit by itself.
BYTES, DIGITS = "bytes", "digits"


@dataclass(frozen=True)
class SplitRule:
    """``steps`` one after another; ``whole_words``: a word that is a token is taken whole, whatever
    the merges say, and a text begins with the first token where the file says nothing of it."""

    steps: tuple[str, ...]
    whole_words: bool = False

    def pre_tokenizer(self, lacking: str) -> Any:
        """The same as a pre-tokenizer of ``tokenizers``.

        ``lacking`` is what :func:`lacking_bytes` says of the vocabulary. llama.cpp leaves these out
        after merging; ``tokenizers`` would do so before, and merge what stood on either side.
        """
        from tokenizers import Regex, pre_tokenizers

        made: list[Any] = []
        for step in self.steps:
            if step == DIGITS:
                made.append(pre_tokenizers.Digits(individual_digits=True))
            elif step != BYTES:
                made.append(pre_tokenizers.Split(Regex(step), behavior="isolated"))
        made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=BYTES in self.steps))
        if lacking:
            made.append(pre_tokenizers.Split(Regex(lacking), behavior="removed"))
        return pre_tokenizers.Sequence(made)


def lacking_bytes(vocabulary: Container[str]) -> str:
    """A regular expression of the letters of bytes that ``vocabulary`` has no token of, or none."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return "|".join(re.escape(letter) for letter in alphabet if letter not in vocabulary)


# The name that a file is written with comes first of those that are the same.
RULES = {
    "llama-bpe": SplitRule((_LLAMA3,), whole_words=True),
    "dbrx": SplitRule((_LLAMA3,)),
    "qwen2": SplitRule((_QWEN2,)),
    "tekken": SplitRule((_TEKKEN,), whole_words=True),
    "gpt-4o": SplitRule((_GPT4O,)),
    "gpt-2": SplitRule((BYTES,)),
    "smollm": SplitRule((DIGITS, BYTES)),
}
_SAME = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"),
    "dbrx": ("smaug-bpe",),
    "qwen2": ("deepseek-r1-qwen", "megrez"),
    "gpt-2": ("phi-2", "mpt", "olmo", "jais"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell"),
}
RULES |= {other: RULES[name] for name, others in _SAME.items() for other in others}
