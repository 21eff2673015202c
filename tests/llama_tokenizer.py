"""The Llama tokenizer as a fast one, made from its SentencePiece file.

A bare ``tokenizer.model`` that transformers converts by itself gets its merges in the order of
token ids, which is not that of the scores for runs of spaces. Here a merge ranks by the score of
what it makes, as SentencePiece does it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def llama_tokenizer(model_file: Path) -> Any:
    """A transformers LlamaTokenizer that adds the beginning-of-sequence token."""
    import sentencepiece
    from transformers import LlamaTokenizer

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    vocabulary = {pieces.id_to_piece(number): number for number in range(len(pieces))}
    merges = []
    for whole, number in vocabulary.items():
        if pieces.is_control(number) or pieces.is_unknown(number) or pieces.is_byte(number):
            continue
        for at in range(1, len(whole)):
            parts = whole[:at], whole[at:]
            if all(part in vocabulary for part in parts):
                rank = (-pieces.get_score(number), number, *(vocabulary[part] for part in parts))
                merges.append((rank, parts))
    return LlamaTokenizer(
        vocab=vocabulary,
        merges=[parts for _, parts in sorted(merges)],
        add_bos_token=True,
        add_eos_token=False,
        pad_token="<unk>",
    )
