"""How near an answer comes to the reference, by the characters and words that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from halfbyte.data.cleaning.words import normalized
from halfbyte.evaluate.rouge import rouge_l


def exact_match(answer: str, reference: str) -> float:
    """1.0 where they are equal but for case, white space, quotes and marks of sentences, else 0.0.

    Characters are compared in Unicode's form NFKC. Signs stay, so that -5 is not 5, and articles
    too, which SQuAD's measure drops and other languages do not have. Two empty texts are equal.
    """
    return float(normalized(answer) == normalized(reference))


def chrf_of() -> Callable[[str, str], float]:
    """The function that gives an answer's chrF2, 0 to 1, as sacrebleu defines it.

    Shares of the character n-grams, n from 1 to 6, in one text that are in the other, F with β = 2,
    so that recall counts twice; no words (Popović, 2015, "chrF: character n-gram F-score for
    automatic MT evaluation"). sacrebleu multiplies by 100.
    """
    from sacrebleu.metrics.chrf import CHRF

    metric: Any = CHRF(char_order=6, word_order=0, beta=2)
    return lambda answer, reference: float(metric.sentence_score(answer, [reference]).score) / 100


def score_answers(answers: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """``exact_match``, ``rouge_l`` and ``chrf`` of each answer against its reference, 0 to 1."""
    pairs = list(zip(answers, references, strict=True))
    chrf = chrf_of()
    return {
        "exact_match": [exact_match(*pair) for pair in pairs],
        "rouge_l": [rouge_l(*pair) for pair in pairs],
        "chrf": [chrf(*pair) for pair in pairs],
    }
