"""Vocabularies in GGUF, beside SentencePiece and the tokenizers that they are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from gguf_case import TEMPLATE
from halfbyte.data.text_template import ALPACA, TextTemplate
from halfbyte.errors import ModelError
from halfbyte.export.gguf.pre_tokenizer import pre_tokenizer_name
from halfbyte.export.gguf.template import (
    LATER_TURNS,
    NO_FIRST_SPACE,
    choose_template,
    llama_cpp_ids,
)
from halfbyte.export.gguf.vocabulary import Vocabulary, vocabulary_of
from halfbyte.generate.prompt import prompt_ids
from llama_tokenizer import llama_tokenizer

ROWS = 32_003


@pytest.fixture(scope="module")
def llama(shared: Path) -> tuple[Any, Any, Vocabulary]:
    """Llama 2's tokenizer as SentencePiece has it and as transformers does, and its vocabulary."""
    import sentencepiece

    [file] = (shared / "data" / "llama-tokenizer").glob("tokenizer.model")
    tokenizer = llama_tokenizer(file)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    return pieces, tokenizer, vocabulary_of(tokenizer, ROWS, {2}, "llama")


def test_scores_and_types_are_sentencepieces(llama: tuple[Any, Any, Vocabulary]) -> None:
    pieces, _, found = llama
    number = len(pieces)
    assert found.tokens[:number] == [pieces.id_to_piece(i) for i in range(number)]
    assert found.tokens[number:] == [f"[PAD{i}]" for i in range(number, ROWS)]
    types = [
        2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1
        for i in range(number)
    ]
    assert found.types == types + [5] * (ROWS - number)
    # Which of two pieces is merged first is all that the scores say.
    assert found.scores is not None
    merged = [i for i in range(number) if found.scores[i] > -1e6]
    ours = sorted(merged, key=lambda i: -found.scores[i])
    assert ours == sorted(merged, key=lambda i: -pieces.get_score(i))
    single = {i for i in range(number) if types[i] == 1} - {*merged}
    assert all(len(pieces.id_to_piece(i)) == 1 for i in single)
    assert (found.model, found.add_bos, found.add_space_prefix) == ("llama", True, True)


def test_llama_cpp_ids_are_sentencepieces(llama: tuple[Any, Any, Vocabulary], shared: Path) -> None:
    """Without special tokens llama.cpp's way is SentencePiece's."""
    pieces, tokenizer, found = llama
    rows = json.loads((shared / "data" / "chatdoctor.json").read_text())[:40]
    for text in [*(row["input"] for row in rows), "a  b   c", " x", "東京 🦙\n\n\t."]:
        assert llama_cpp_ids(tokenizer, text, found) == [1, *pieces.encode(text)]


def test_an_instruction_format_has_one_space(llama: tuple[Any, Any, Vocabulary]) -> None:
    """The trained template writes a space, for programs that put none there; llama.cpp does."""
    _, tokenizer, vocabulary = llama
    trained = TextTemplate(ALPACA, tokenizer)
    template = trained.chat_template()
    assert "bos_token + ' '" in template
    found = choose_template(tokenizer, template, vocabulary)
    assert found.template is not None
    assert "bos_token + ' '" not in found.template
    assert found.vocabulary.add_space_prefix
    assert found.notes == (LATER_TURNS,)
    text = ALPACA.prompt("What helps against a cough?")
    assert llama_cpp_ids(tokenizer, text, found.vocabulary) == prompt_ids(tokenizer, text)


def test_a_conversation_has_no_space_behind_special_tokens(
    llama: tuple[Any, Any, Vocabulary],
) -> None:
    import copy

    _, made, _ = llama
    tokenizer = copy.deepcopy(made)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    vocabulary = vocabulary_of(tokenizer, ROWS, {2}, "llama")
    found = choose_template(tokenizer, TEMPLATE, vocabulary)
    assert (found.template, found.notes) == (TEMPLATE, (NO_FIRST_SPACE,))
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert llama_cpp_ids(tokenizer, text, found.vocabulary) == prompt_ids(tokenizer, text)
    assert llama_cpp_ids(tokenizer, text, vocabulary) != prompt_ids(tokenizer, text)


def rule(*steps: Any, whole: bool = False, normalizer: Any = None) -> dict[str, Any]:
    made = Tokenizer(models.BPE(ignore_merges=whole))
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps])
    if normalizer is not None:
        made.normalizer = normalizer
    return json.loads(made.to_str())


def test_rules_have_llama_cpps_names() -> None:
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

    def regex(digits: str, contractions: str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)") -> Any:
        return pre_tokenizers.Split(Regex(contractions + split % digits), "isolated")

    assert pre_tokenizer_name(rule(gpt2), "m") == "gpt-2"
    digits = pre_tokenizers.Digits(individual_digits=True)
    assert pre_tokenizer_name(rule(digits, gpt2), "m") == "smollm"
    assert pre_tokenizer_name(rule(regex(""), bytes_alone), "m") == "qwen2"
    assert pre_tokenizer_name(rule(regex("{1,3}"), bytes_alone, whole=True), "m") == "llama-bpe"
    assert pre_tokenizer_name(rule(regex("{1,3}"), bytes_alone), "m") == "dbrx"
    other = regex("{1,3}", "'(?i:[sdmt]|ll|ve|re)")
    assert pre_tokenizer_name(rule(other, bytes_alone), "m") == "dbrx"
    for strange in (
        rule(regex("{1,2}"), bytes_alone),
        rule(regex(""), bytes_alone, whole=True),
        rule(pre_tokenizers.Whitespace(), bytes_alone),
        rule(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    ):
        with pytest.raises(ModelError, match="splits text by a rule"):
            pre_tokenizer_name(strange, "m")


def test_what_llama_cpp_does_not_do_is_said(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert vocabulary_of(tokenizer, 300, {2}, "m").notes == ()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    [note] = vocabulary_of(tokenizer, 300, {2}, "m").notes
    assert "NFC" in note
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ModelError, match="Lowercase"):
        vocabulary_of(tokenizer, 300, {2}, "m")
    with pytest.raises(ModelError, match="not of one model"):
        vocabulary_of(AutoTokenizer.from_pretrained(tiny_model), 200, {2}, "m")
