"""Tokens and labels of rendered rows."""

from __future__ import annotations

import json
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from halfbyte.data.batch import Segment
from halfbyte.data.long_rows import Leading, fit_row
from halfbyte.data.prepare import prepare
from halfbyte.data.tokenize import leading_ids, tokenize_rows, tokenized
from halfbyte.errors import DataError
from halfbyte.recipe import Recipe
from llama_tokenizer import llama_tokenizer

CHATDOCTOR = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### output:\n{output}"

# Pieces that meet at borders in awkward ways: spaces, line ends, marks that combine, characters
# of two to four bytes, special tokens.
PIECES = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    " a",
    "a ",
    "number",
    "é",
    "e\u0301",
    "ﬁ",
    "字",
    "😀",
    "👩‍🚀",
]
SPECIAL = ["<|im_end|>", "</s>", "<s>"]
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
texts = st.lists(st.one_of(st.sampled_from(PIECES + SPECIAL), st.text(max_size=6))).map("".join)
rows = st.lists(st.tuples(texts, st.booleans()), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def trimming(tiny_model: Path) -> Any:
    """A byte-level tokenizer whose offsets leave out a token's spaces, as GPT-2's do."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@pytest.fixture(scope="module")
def llama(shared: Path) -> Any:
    return llama_tokenizer(shared / "data" / "llama-tokenizer" / "tokenizer.model")


@cache
def bytes_of(tokenizer: Any, token_id: int) -> bytes:
    """The bytes that a token stands for, from its own spelling."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token_id in tokenizer.added_tokens_decoder:
        return token.encode()
    if type(tokenizer).__name__ == "LlamaTokenizer":
        if token.startswith("<0x") and token.endswith(">") and len(token) == 6:
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()
    return bytes(BYTES[character] for character in token)


def slow_labels(tokenizer: Any, segments: list[Segment], ids: list[int]) -> list[bool]:
    """Byte by byte: a token is learned if the segment of its last byte is."""
    owner = [s.learn for s in segments for _ in s.text.encode()]
    sizes = [len(bytes_of(tokenizer, token)) for token in ids]
    spelled = b"".join(bytes_of(tokenizer, token) for token in ids)
    text = "".join(s.text for s in segments).encode()
    extra = len(spelled) - len(text)  # Llama's space before the first piece
    assert spelled[extra:] == text
    assert spelled[:extra] in (b"", b" ")
    return [owner[max(0, end - extra - 1)] for end in accumulate(sizes)]


@pytest.mark.parametrize("name", ["tiny", "trimming", "llama"])
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(row=rows)
def test_labels_are_those_of_a_count_by_bytes(
    name: str, row: list[tuple[str, bool]], request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    segments = [Segment(text.replace("▁", "_"), learn) for text, learn in row]
    text = "".join(segment.text for segment in segments)
    [found] = tokenize_rows(tokenizer, [segments], [7])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    lead = [] if name != "llama" or text.startswith("<s>") else [tokenizer.bos_token_id]
    expected = [False] * len(lead) + slow_labels(tokenizer, segments, ids)
    expected[:1] = [False] * len(expected[:1])  # nothing predicts the first token
    assert found.input_ids.tolist() == lead + ids
    assert found.loss_mask.tolist() == expected
    assert found.row == 7


def test_a_token_across_a_border_belongs_to_the_later_segment(tiny: Any) -> None:
    # "number" is one token of this tokenizer.
    [whole] = tokenize_rows(tiny, [[Segment("a number", False)]], [0])
    [split] = tokenize_rows(tiny, [[Segment("a num", False), Segment("ber", True)]], [0])
    assert split.input_ids.tolist() == whole.input_ids.tolist()
    assert split.loss_mask.tolist() == [False] * (len(whole) - 1) + [True]
    [back] = tokenize_rows(tiny, [[Segment("a num", True), Segment("ber", False)]], [0])
    assert back.loss_mask.tolist()[-1] is False


def test_rows_come_in_chunks(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.data.tokenize.ROWS_AT_ONCE", 4)
    rows = [[Segment(f"It is {n}", True)] for n in range(10)]
    chunks = list(tokenized(tiny, zip(rows, range(10), strict=True)))
    assert [[row.row for row in chunk] for chunk in chunks] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]


def test_a_tokenizer_saved_with_truncation_and_padding_does_neither(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    segments = [[Segment("Say it. ", False), Segment("It " * n, True)] for n in (2, 40)]
    expected = tokenize_rows(tokenizer, segments, [0, 1])
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    for row, whole in zip(tokenize_rows(tokenizer, segments, [0, 1]), expected, strict=True):
        assert row.input_ids.tolist() == whole.input_ids.tolist()
        assert row.loss_mask.tolist() == whole.loss_mask.tolist()


def test_rows_of_a_call_do_not_depend_on_one_another(tiny: Any) -> None:
    segments = [[Segment(f"{'x' * n}: ", False), Segment(f"It is {n}", True)] for n in range(40)]
    together = tokenize_rows(tiny, segments, list(range(40)))
    for number, row in enumerate(together):
        [alone] = tokenize_rows(tiny, [segments[number]], [number])
        np.testing.assert_array_equal(row.input_ids, alone.input_ids)
        np.testing.assert_array_equal(row.loss_mask, alone.loss_mask)


def test_a_cut_row_counts_what_it_lost(tiny: Any) -> None:
    [row] = tokenize_rows(tiny, [[Segment("abc", False), Segment("defgh", True)]], [0])
    [short] = fit_row(row, 5, "cut_right", Leading((), None))
    assert (len(short), short.cut, short.num_labels) == (5, len(row) - 5, 2)
    assert short.input_ids.tolist() == row.input_ids.tolist()[:5]
    assert fit_row(row, len(row), "cut_right", Leading((), None))[0] is row


def test_tokens_added_at_the_end_are_left_off(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>",
        special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)],
    )
    assert leading_ids(tokenizer) == [0]
    [row] = tokenize_rows(tokenizer, [[Segment("a", False), Segment("<|im_end|>", True)]], [0])
    assert row.input_ids.tolist() == [0, *tokenizer("a", add_special_tokens=False)["input_ids"], 2]
    assert row.loss_mask.tolist() == [False, False, True]


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match=r"gives no character offsets"):
        tokenize_rows(Slow(), [[Segment("a", True)]], [0])


# ---- the same rows through TRL -------------------------------------------------------------


def chatdoctor_recipe(shared: Path, loss_on: str, max_length: int) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": "tinyllama"},
            "data": {
                "path": str(shared / "data" / "chatdoctor.json"),
                "template": CHATDOCTOR,
                "loss_on": loss_on,
                "held_out": 0,
                "max_length": max_length,
            },
        }
    )


def trl_rows(tokenizer: Any, examples: list[dict[str, str]], folder: Path, max_length: int) -> Any:
    """Token ids and labels as TRL's trainer prepares them."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        args=SFTConfig(
            output_dir=str(folder),
            max_length=max_length,
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
    )
    return trainer.train_dataset


@pytest.mark.parametrize(("loss_on", "max_length"), [("all", 200), ("answer", 512)])
def test_tokens_and_labels_equal_those_of_trl(
    llama: Any, shared: Path, tmp_path: Path, loss_on: str, max_length: int
) -> None:
    """All 3,000 rows, as whole texts and, for labels on answers, as prompt and completion."""
    source = json.loads((shared / "data" / "chatdoctor.json").read_text(encoding="utf-8"))
    prompt = CHATDOCTOR.removesuffix("{output}")
    if loss_on == "all":
        examples = [{"text": CHATDOCTOR.format(**row)} for row in source]
    else:
        examples = [{"prompt": prompt.format(**r), "completion": r["output"]} for r in source]
    theirs = trl_rows(llama, examples, tmp_path, max_length)
    ours = prepare(chatdoctor_recipe(shared, loss_on, max_length), llama, 2048).train
    assert len(ours) == len(theirs) == 3000
    shortened = 0
    for row, other in zip(ours, theirs, strict=True):
        assert row.input_ids.tolist() == other["input_ids"]
        labels = np.where(row.loss_mask, row.input_ids, -100)[1:]  # as shifted for the loss
        assert labels.tolist() == other["labels"][1:]
        assert row.cut or row.input_ids[-1] == llama.eos_token_id
        shortened += row.cut > 0
    assert (shortened > 0) == (max_length == 200)
