"""A fast tokenizer out of a bare SentencePiece file (Llama 2 and its kin).

transformers makes one too, but orders its merges by token id where SentencePiece merges the pair
with the highest score first. Llama's runs of spaces have low ids and the lowest scores, so text
with double spaces comes out in other tokens than those the model was trained on. Ordered by score,
the ids are SentencePiece's own; a test compares them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfbyte.errors import ModelError
from halfbyte.foreign_json import read_json, read_small
from halfbyte.model.sentencepiece_merges import LONGEST_PIECE, merges_by_score

FILE = "tokenizer.model"
_FAMILIES = ("llama", "mistral")
_SETTINGS = (
    *("bos_token", "eos_token", "unk_token", "pad_token", "add_bos_token", "add_eos_token"),
    *("chat_template", "model_max_length"),
)
_FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")


def sentencepiece_tokenizer(folder: Path, name: str, model_type: str) -> Any:
    """The tokenizer of ``folder / tokenizer.model`` with its tokenizer_config.json, if any.

    Raises ModelError for another family than Llama's, whose way around SentencePiece is not
    known, for an unreadable file, and for one whose pieces are not made by merging (unigram).
    """
    import sentencepiece
    from transformers import AddedToken, LlamaTokenizer

    if model_type not in _FAMILIES:
        raise ModelError(
            f"{name} has a {FILE} but no tokenizer.json, and for a {model_type!r} model no right "
            "tokenizer can be made of that: add its tokenizer.json to the folder."
        )
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / FILE))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{folder / FILE} is no SentencePiece file: get it again.") from error
    if len(pieces) and max(len(pieces.id_to_piece(i)) for i in range(len(pieces))) > LONGEST_PIECE:
        raise ModelError(
            f"{folder / FILE} has a piece of over {LONGEST_PIECE} characters: get it again."
        )
    vocabulary = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    settings, added = _settings(folder)
    scores = {
        piece: pieces.get_score(i)
        for piece, i in vocabulary.items()
        if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i))
    }
    tokenizer = LlamaTokenizer(
        vocab=vocabulary,
        merges=merges_by_score(vocabulary, scores),
        **{"add_bos_token": True, **settings},
    )
    for number, token in sorted(added.items()):
        flags = {flag: bool(token.get(flag)) for flag in _FLAGS}
        content = token["content"]
        tokenizer.add_tokens([AddedToken(content, **flags)], special_tokens=flags["special"])
        if tokenizer.convert_tokens_to_ids(content) != number:
            raise ModelError(
                f"{folder / 'tokenizer_config.json'} gives {content!r} the id {number}, which does "
                f"not fit {FILE}: add the model's tokenizer.json to the folder."
            )
    return tokenizer


def _settings(folder: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Arguments for the tokenizer, and added tokens by their id."""
    path = folder / "tokenizer_config.json"
    template = folder / "chat_template.jinja"
    try:
        raw = read_json(path) if path.exists() else {}
        settings = {key: raw[key] for key in _SETTINGS if raw.get(key) is not None}
        for key, value in settings.items():
            if isinstance(value, dict) and "content" in value:
                settings[key] = value["content"]
        if template.exists():
            settings["chat_template"] = read_small(template).decode("utf-8")
        added = {int(i): dict(token) for i, token in raw.get("added_tokens_decoder", {}).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} is not a tokenizer's configuration: get it again.") from error
    return settings, added
