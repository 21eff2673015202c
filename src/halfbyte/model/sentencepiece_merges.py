"""SentencePiece's BPE as merges: it merges the pair whose piece has the highest score first."""

from __future__ import annotations

from collections.abc import Mapping

# Characters of a piece, which is tried at every cut; SentencePiece makes 16.
LONGEST_PIECE = 1000


def merges_by_score(
    vocabulary: Mapping[str, int], scores: Mapping[str, float]
) -> list[tuple[str, str]]:
    """All pairs of pieces in ``vocabulary`` that make one of ``scores``, the highest score first.

    Of the same score the piece with the lower id comes first, and of its pairs the one with lower
    ids.
    """
    scored = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
            if left is not None and right is not None:
                scored.append((-score, vocabulary[piece], left, right, piece[:cut], piece[cut:]))
    return [(left, right) for *_, left, right in sorted(scored)]
