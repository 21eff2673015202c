"""Scores and looks of answers, against rouge-score, slow obvious versions and texts by hand."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import ModelError
from halfbyte.evaluate.answer_scores import exact_match, score_answers
from halfbyte.evaluate.bert_score import open_bert
from halfbyte.evaluate.looks import look_at, mean_look
from halfbyte.evaluate.rouge import common_subsequence, rouge_l, words_of

ASCII_TEXT = st.lists(
    st.sampled_from(["the", "The", "cat's", "sat", "3.5", "mat_x", "-", "!?", "\n", "a\tb"]),
    max_size=30,
).map(" ".join)


@given(ASCII_TEXT | st.text(st.characters(codec="ascii"), max_size=80), ASCII_TEXT)
@settings(max_examples=150, deadline=None)
def test_rouge_l_is_rouge_scores(answer: str, reference: str) -> None:
    assert rouge_l(answer, reference) == pytest.approx(theirs(answer, reference), abs=1e-12)


@cache
def rouge_score() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def theirs(answer: str, reference: str) -> float:
    return float(rouge_score().score(reference, answer)["rougeL"].fmeasure)


def test_rouge_l_of_real_answers(shared: Path) -> None:
    rows = json.loads((shared / "data" / "chatdoctor.json").read_text(encoding="utf-8"))[:60]
    texts = [row["output"].encode("ascii", "ignore").decode() for row in rows]
    scores = [rouge_l(one, other) for one, other in pairwise(texts)]
    expected = [theirs(one, other) for one, other in pairwise(texts)]
    assert scores == pytest.approx(expected, abs=1e-12)
    assert 0 < min(scores) < max(scores) < 1


@given(*[st.lists(st.sampled_from("abcd"), max_size=70)] * 2)
@settings(max_examples=200, deadline=None)
def test_the_longest_common_subsequence(one: list[str], other: list[str]) -> None:
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            same = table[i][j] + 1
            table[i + 1][j + 1] = same if a == b else max(table[i][j + 1], table[i + 1][j])
    assert common_subsequence(one, other) == table[-1][-1]


def test_words_of_any_script() -> None:
    assert words_of("Ärztin, 3.5 mg; naïve_x") == ["ärztin", "3", "5", "mg", "naïve", "x"]
    assert words_of("他说: hello 世界") == ["他", "说", "hello", "世", "界"]
    assert rouge_l("Привет, мир", "привет мир!") == 1.0
    assert rouge_l("", "") == rouge_l("!", "!") == 0.0


TEXTS = st.text(st.sampled_from("ab c.é世"), max_size=40)


@given(TEXTS, TEXTS)
@settings(max_examples=150, deadline=None)
def test_chrf_is_its_definition(answer: str, reference: str) -> None:
    (found,) = score_answers([answer], [reference])["chrf"]
    assert found == pytest.approx(slow_chrf(answer, reference), abs=1e-6)


def slow_chrf(answer: str, reference: str) -> float:
    """F2 of the mean precision and the mean recall over the orders that both texts have."""
    one, other = ("".join(text.split()) for text in (answer, reference))
    precisions, recalls = [], []
    for n in range(1, 7):
        grams = [Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (one, other)]
        if not grams[0] or not grams[1]:
            continue
        common = (grams[0] & grams[1]).total()
        precisions.append(common / grams[0].total())
        recalls.append(common / grams[1].total())
    if not precisions:
        return 0.0
    p, r = (sum(values) / len(values) for values in (precisions, recalls))
    return 5 * p * r / (4 * p + r) if p + r else 0.0


def test_exact_matches() -> None:
    assert exact_match(" The answer:\n“42”. ", "the ANSWER 42") == 1.0
    assert exact_match("ｆｕｌｌ width", "full width") == 1.0
    assert exact_match("-5", "5") == exact_match("1.5", "15") == exact_match("5-3", "5/3") == 0.0
    assert exact_match("", "...") == 1.0


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("Take two a day.", set()),
        ("First:\n- rest\n- water", {"list"}),
        ("1. Rest.\n2) Water.", {"list"}),
        ("One line:\n- alone.", set()),
        ("# Causes\nMany.", {"headings"}),
        ("**Causes:**\nMany.", {"headings", "bold"}),
        ("This is **not** 2 ** 3 ** 4.", {"bold"}),
        ("I use 2 ** 3 and f(*a, **b).", set()),
        ("As an AI language model, I cannot.", {"says_machine"}),
        ("I’m an AI, so no.", {"says_machine"}),
        ("An AI lab wrote that.", set()),
        ("Please consult a qualified doctor.", {"to_professional"}),
        ("It is no substitute for professional medical advice.", {"to_professional"}),
        ("The doctor will see you. Ask away.", set()),
        (
            "The treatment of this disease begins with a long and careful look at the",
            {"breaks_off"},
        ),
        ("", {"empty"}),
    ],
)
def test_what_is_seen_of_a_text(text: str, seen: set[str]) -> None:
    look = look_at(text)
    names = ("list", "headings", "bold", "says_machine", "to_professional", "breaks_off", "empty")
    assert {name for name in names if getattr(look, name)} == seen
    assert look.words == len(text.split())


def test_shares_of_texts() -> None:
    found = mean_look(["one two", "", "a b c d e\n- f\n- g"])
    assert (found["words"], found["words_median"]) == (pytest.approx(11 / 3), 2)
    assert (found["list"], found["empty"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 4 layers with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "cat", "sat", "on", "the", "mat", "dog"]
    tokenizer = Tokenizer(models.WordLevel(dict(zip(words, range(99), strict=False)), "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    ).save_pretrained(folder)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def slow_bert_score(folder: Path, layer: int, answer: str, reference: str) -> float:
    """The paper's equations token by token, in float64; special tokens are not averaged over."""
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder).double().eval()

    def states(text: str) -> list[list[float]]:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            found = model(ids, output_hidden_states=True).hidden_states[layer][0]
        rows: list[list[float]] = found.tolist()
        return rows

    def cosine(one: Sequence[float], other: Sequence[float]) -> float:
        dot = sum(a * b for a, b in zip(one, other, strict=True))
        return dot / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))

    one, other = states(answer), states(reference)
    precision = [max(cosine(x, y) for y in other) for x in one[1:-1]]
    recall = [max(cosine(x, y) for x in one) for y in other[1:-1]]
    p, r = sum(precision) / len(precision), sum(recall) / len(recall)
    return 2 * p * r / (p + r)


def test_bert_score_is_the_papers(tiny_bert: Path) -> None:
    scorer = open_bert(str(tiny_bert))
    assert scorer.layer == 3
    pairs = [
        ("the cat sat on the mat", "a dog sat"),
        ("mat", "the the the the"),
        ("a cat", "a cat"),
        ("", "a cat"),
        ("cat sat", " "),
    ]
    found = scorer.f1(*zip(*pairs, strict=True))
    expected = [slow_bert_score(tiny_bert, 3, *pair) for pair in pairs[:3]]
    assert found == pytest.approx([*expected, 0.0, 0.0], abs=1e-6)
    assert found[2] == pytest.approx(1.0, abs=1e-6)
    assert scorer.f1(["cat " * 40], ["cat"])[0] > 0, "a text of more tokens than the model takes"


def test_bert_scores_model_must_be_one(tiny_bert: Path, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_bert, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        open_bert(str(pickled))
    with pytest.raises(ModelError, match="no folder of this machine"):
        open_bert("/no/such/model")
    (pickled / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be read"):
        open_bert(str(pickled))
