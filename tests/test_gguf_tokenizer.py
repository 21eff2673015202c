"""Tokenizers out of GGUF files, beside slow ones that are written down step by step."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import regex
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from halfbyte.errors import ModelError
from halfbyte.export.gguf.pre_tokenizer import pre_tokenizer_name
from halfbyte.model.gguf_file import GgufFile
from halfbyte.model.gguf_split import RULES
from halfbyte.model.gguf_tokenizer import gguf_tokenizer

GPT2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
SPECIAL = regex.compile(r"(<\|im_start\|>|<\|im_end\|>|<\|endoftext\|>)")
PARTS = [
    *(
        "1",
        "23",
        "４",
        "²",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "'ll",
        "don't",
        "Hello",
        "héllo",
    ),
    *(
        " the",
        "x_1=3.14e-10",
        "東京",
        "🦙",
        "<|im_start|>",
        "<|im_end|>",
        "<|im",
        "\u00a0",
        "…",
        "é",
    ),
]
# What a letter without a name becomes, a later Unicode says, and libraries are of different ones.
named = st.text(st.characters(exclude_categories=["Cn", "Cs"]), max_size=3)
texts = st.lists(st.sampled_from(PARTS) | named, max_size=12).map("".join)


class SlowSmolLM2:
    """Split at digits, then by GPT-2's expression, then merge the first pair in the list."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)

        def array(key: str) -> list[str]:
            field = reader.fields[f"tokenizer.ggml.{key}"]
            return [bytes(field.parts[index]).decode() for index in field.data]

        self.ids = {token: number for number, token in enumerate(array("tokens"))}
        self.rank = {tuple(m.split(" ")): number for number, m in enumerate(array("merges"))}
        printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printed]
        self.letters = {b: chr(b) for b in printed}
        self.letters |= {b: chr(256 + number) for number, b in enumerate(others)}

    def __call__(self, text: str) -> list[int]:
        found: list[int] = []
        for number, part in enumerate(SPECIAL.split(text)):
            if number % 2:
                found.append(self.ids[part])
            else:
                for piece in regex.findall(r"\p{N}|\P{N}+", part):
                    for word in GPT2.findall(piece):
                        found += self._merged([self.letters[b] for b in word.encode()])
        return found

    def _merged(self, parts: list[str]) -> list[int]:
        while True:
            pairs = [(self.rank.get(pair, 1 << 30), i) for i, pair in enumerate(pairwise(parts))]
            rank, at = min(pairs, default=(1 << 30, 0))
            if rank == 1 << 30:
                return [self.ids[part] for part in parts if part in self.ids]  # bytes it lacks
            parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> tuple[Any, SlowSmolLM2]:
    return gguf_tokenizer(GgufFile(smollm2_gguf), "SmolLM2"), SlowSmolLM2(smollm2_gguf)


@settings(max_examples=300, deadline=None)
@given(text=texts)
@example(text=":\x16'll")  # between two that merge, a byte that the vocabulary lacks
def test_smollm2_splits_digits_first(smollm2: tuple[Any, SlowSmolLM2], text: str) -> None:
    made, slow = smollm2
    ids = made(text)["input_ids"]
    assert ids == slow(text)
    if all(slow.letters[byte] in slow.ids for byte in text.encode()):
        assert made.decode(ids) == text


def test_a_digit_behind_a_line_break(smollm2: tuple[Any, SlowSmolLM2]) -> None:
    made, slow = smollm2
    assert made("1.\n2.")["input_ids"] == slow("1.\n2.") == [33, 30, 198, 34, 30]
    assert (made.bos_token, made.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert made.is_fast


def write(path: Path, **says: Any) -> GgufFile:
    """A file with a tokenizer alone; ``says`` are its metadata, None leaves one out."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in says.items():
        if isinstance(value, list):
            writer.add_array(f"tokenizer.ggml.{key}", value)
        elif value is not None:
            writer.add_key_value(f"tokenizer.ggml.{key}", value, KINDS[type(value)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GgufFile(path)


KINDS = {
    str: gguf.GGUFValueType.STRING,
    bool: gguf.GGUFValueType.BOOL,
    int: gguf.GGUFValueType.UINT32,
}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SentencePiece's own BPE with bytes to fall back on, as Llama 2 has it."""
    model = tmp_path_factory.mktemp("pieces") / "pieces"
    words = "the number is one and two, that is all; say it again and again in other words. "
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words + str(n) + "  " + words[n % 40 :] for n in range(400)]),
        model_prefix=str(model),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        character_coverage=0.999,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{model}.model")


def says_of(pieces: Any) -> dict[str, Any]:
    number = range(len(pieces))
    kinds: list[tuple[int, Callable[[int], bool]]] = [
        (2, pieces.is_unknown), (3, pieces.is_control), (6, pieces.is_byte), (5, pieces.is_unused)
    ]  # fmt: skip
    return {
        "model": "llama",
        "tokens": [pieces.id_to_piece(i) for i in number] + ["[PAD400]"],
        "scores": [pieces.get_score(i) for i in number] + [-1000.0],
        "token_type": [next((k for k, is_one in kinds if is_one(i)), 1) for i in number] + [5],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


@pytest.fixture(scope="module")
def of_pieces(pieces: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = write(tmp_path_factory.mktemp("gguf") / "pieces.gguf", **says_of(pieces))
    return gguf_tokenizer(file, "pieces")


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(
            ["the", " the", "number", "  ", " ", "again ", "7", "é", "東", "\n", ".", "wo"]
        ),
        max_size=20,
    ).map("".join)
)
def test_sentencepieces_own_tokens(pieces: Any, of_pieces: Any, text: str) -> None:
    if text:
        assert of_pieces(text)["input_ids"] == [1, *pieces.encode(text)]
        assert of_pieces.decode(of_pieces(text)["input_ids"], skip_special_tokens=True) == text
    assert len(of_pieces) == 400, "a row without a token is none"


def byte_level(**settings: Any) -> dict[str, Any]:
    """A small byte-level vocabulary with three special tokens and one that is not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the number 123 and the word"] * 3, trainer)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    added = ["<s>", "</s>", "<think>", "[PAD0]"]
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens + added,
        "token_type": [1] * len(tokens) + [3, 3, 4, 5],
        "merges": [" ".join(pair) for pair in merges],
        "bos_token_id": len(tokens),
        "eos_token_id": len(tokens) + 1,
    } | settings


def test_what_a_file_says_of_the_ends_of_a_text(tmp_path: Path) -> None:
    says = byte_level(add_bos_token=True, add_eos_token=True)
    made = gguf_tokenizer(write(tmp_path / "a.gguf", **says), "a")
    first, last = says["bos_token_id"], says["eos_token_id"]
    ids = made("the<think> <s>word")["input_ids"]
    assert (ids[0], ids[-1]) == (first, last)
    assert {first + 2, first} <= set(ids[1:-1]), "both kinds of added tokens are taken whole"
    assert made.decode(ids, skip_special_tokens=True) == "the<think> word"
    plain = gguf_tokenizer(write(tmp_path / "b.gguf", **byte_level()), "b")
    assert first not in plain("the")["input_ids"]
    whole = byte_level(pre="llama-bpe")
    assert gguf_tokenizer(write(tmp_path / "c.gguf", **whole), "c")("the")["input_ids"][0] == first
    assert "[PAD0]" not in made.get_vocab()


def test_a_vocabulary_that_lacks_bytes_is_written_under_its_own_rule(
    smollm2: tuple[Any, SlowSmolLM2], tmp_path: Path
) -> None:
    made, slow = smollm2
    assert not {slow.letters[byte] for byte in range(256)} <= set(slow.ids)
    made.save_pretrained(tmp_path)
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for tokenizer in (made, saved):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        assert pre_tokenizer_name(backend, "SmolLM2") == "smollm"
    backend["model"]["vocab"][slow.letters[0x16]] = 0  # it is removed, and has a token
    with pytest.raises(ModelError, match="splits text by a rule"):
        pre_tokenizer_name(backend, "another")


@pytest.mark.parametrize("name", RULES)
def test_every_rule_keeps_the_text(tmp_path: Path, name: str) -> None:
    made = gguf_tokenizer(write(tmp_path / "a.gguf", **byte_level(pre=name)), "a")
    written = pre_tokenizer_name(json.loads(made.backend_tokenizer.to_str()), "a")
    assert RULES[written] == RULES[name]
    text = "the Number 12345's\n\n 6/7\r\n  naïve東京🦙 word  "
    assert made.decode(made(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model": "bert"}, "a tokenizer of the kind 'bert'"),
        ({"pre": "own"}, "names 'own' how its tokenizer splits text"),
        ({"pre": None}, "does not say how its tokenizer splits text"),
        ({"eos_token_id": 9999}, "names the token 9999 as its eos_token_id"),
        ({"token_type": [1, 1]}, "and 2 types of them"),
        ({"merges": ["t"]}, "cannot be read"),
        ({"merges": ["t zzz"]}, "cannot be read"),
        ({"model": "llama"}, "has no score of each of its tokens"),
        ({"eos_token_id": None}, "names no end-of-sequence token"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    file = write(tmp_path / "a.gguf", **(byte_level() | changed))
    with pytest.raises(ModelError, match=says):
        gguf_tokenizer(file, "the model")
