"""ROUGE-L: how much of a text is there in another, word for word and in order.

Lin, 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.1, with β = 1, as the
package ``rouge-score`` has it without stemming.
"""

from __future__ import annotations

import re

from halfbyte.data.cleaning.words import WIDE

# A word is letters and digits of any script; of scripts that put no space between words, each
# character is one. On ASCII this is what rouge-score does, which drops the letters of all others.
_WORDS = re.compile(f"[{WIDE}]|[^\\W_{WIDE}]+")


def words_of(text: str) -> list[str]:
    """The words of ``text`` in small letters."""
    return _WORDS.findall(text.lower())


def rouge_l(answer: str, reference: str) -> float:
    """The F1 of their longest common subsequence of words: 0 nothing in common, 1 the same words.

    It is 0 where either has no words.
    """
    said, wanted = words_of(answer), words_of(reference)
    common = common_subsequence(said, wanted)
    # 2PR / (P + R) with P = common / said and R = common / wanted.
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def common_subsequence(one: list[str], other: list[str]) -> int:
    """The length of the longest common subsequence.

    A row of the usual table is one whole number here, a bit for each word of ``one``, so that a
    step of it is an addition (Hyyrö, 2004, "Bit-parallel LCS-length computation revisited").
    """
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    all_ones = (1 << len(one)) - 1
    row = all_ones
    for word in other:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & all_ones
    return len(one) - row.bit_count()
