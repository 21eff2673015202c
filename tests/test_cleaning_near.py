"""Near duplicates against every pair compared, and what keeps their time linear."""

from __future__ import annotations

import json
import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cleaning_case import SENTENCES, cleaned, conversation, filters, left, row
from halfbyte.data.cleaning import clean, minhash, near_duplicates
from halfbyte.data.cleaning.minhash import band_keys, bands_for, groups_of
from halfbyte.data.cleaning.near_duplicates import shingles_of
from halfbyte.data.cleaning.words import words_of
from halfbyte.data.example import Example
from halfbyte.errors import DataError

pytest.importorskip("datasketch")


def similarity(one: str, other: str, ngram: int = 3) -> float:
    """The Jaccard similarity of word sequences, by its definition."""
    first, second = sequences(one, ngram), sequences(other, ngram)
    return len(first & second) / len(first | second) if first or second else 0.0


@cache
def sequences(text: str, ngram: int) -> frozenset[tuple[str, ...]]:
    words = words_of(text)
    number = max(1, len(words) - ngram + 1) if words else 0
    return frozenset(tuple(words[i : i + ngram]) for i in range(number))


def made_of(count: int, seed: int = 0) -> list[Example]:
    """Rows of which many are alike to some degree: copies with words exchanged or left out."""
    rng = random.Random(seed)
    vocabulary = [f"w{n}" for n in range(500)]
    texts = [rng.choices(vocabulary, k=rng.randint(20, 120)) for _ in range(count // 3)]
    while len(texts) < count:
        words = list(rng.choice(texts[: count // 3]))
        for _ in range(rng.choice([0, 1, 1, 2, 3, 5, 8])):
            at = rng.randrange(len(words))
            words[at : at + 1] = rng.choice([[], [rng.choice(vocabulary)], ["x", words[at]]])
        texts.append(words)
    rng.shuffle(texts)
    return [row("", " ".join(words), number) for number, words in enumerate(texts)]


def greedy(examples: list[Example], threshold: float) -> dict[int, int]:
    """Rows that go and the earlier one for which they do: each compared with all that stay."""
    stay: list[Example] = []
    gone: dict[int, int] = {}
    for example in examples:
        like = next((e for e in stay if similarity(e.answer, example.answer) >= threshold), None)
        if like is None:
            stay.append(example)
        else:
            gone[example.row] = like.row
    return gone


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.85, 0.95, 1.0])
def test_no_row_goes_in_error_and_few_are_missed(threshold: float) -> None:
    examples = made_of(300)
    expected = greedy(examples, threshold)
    stay = set(left(examples, {"filter": "near_duplicates", "threshold": threshold}))
    gone = {example.row for example in examples} - stay
    by_row = {example.row: example for example in examples}
    assert len(expected) > 20
    for number in gone:  # precision 1, by the definition
        likeness = max(
            similarity(by_row[number].answer, by_row[other].answer)
            for other in stay
            if other < number
        )
        assert likeness >= threshold
    # 99 % of the pairs that only just reach the threshold, and more of the others.
    assert len(gone & expected.keys()) >= 0.98 * len(expected)


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0])
def test_bands_find_what_they_promise(threshold: float) -> None:
    bands, length = bands_for(threshold)
    assert bands * length <= minhash.PERMUTATIONS
    assert 1 - (1 - threshold**length) ** bands >= minhash.RECALL
    # Pairs of exactly this similarity, made with sets of numbers.
    rng = np.random.default_rng(1)
    both = round(400 * threshold)
    texts: list[list[bytes]] = []
    for _ in range(150):
        numbers = [str(n).encode() for n in rng.choice(10**9, 400, replace=False)]
        extra = (400 - both) // 2
        texts += [numbers[: both + extra], numbers[:both] + numbers[both + extra :]]
    keys = band_keys(texts, len(texts), threshold)
    found = (keys[:, 0::2] == keys[:, 1::2]).any(axis=0).mean()
    assert found >= 0.95  # 99 % less four standard deviations of 150 draws
    # Texts that have nothing in common have no band in common either.
    assert not (keys[:, 0:-2:2] == keys[:, 2::2]).any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), max_size=12))
def test_groups_are_those_of_equal_keys(columns: list[list[int]]) -> None:
    keys = np.array(columns, dtype=np.uint64).reshape(len(columns), 3).T
    groups = groups_of(keys)
    assert groups.shape == (len(columns), 3)
    for band in range(3):
        for i in range(len(columns)):
            same = [j for j in range(len(columns)) if keys[band, j] == keys[band, i]]
            alone = len(same) == 1 or keys[band, i] == 0
            assert (groups[i, band] < 0) == alone
            if not alone:
                assert [
                    j for j in range(len(columns)) if groups[j, band] == groups[i, band]
                ] == same
    used = [set(groups[:, band].tolist()) - {-1} for band in range(3)]
    assert not used[0] & used[1]
    assert not used[1] & used[2]


def test_rows_are_compared_within_their_frame() -> None:
    near = {"filter": "near_duplicates", "by": "question", "threshold": 0.7}
    text = SENTENCES["en"]
    examples = [
        Example.question_and_answer(0, "Translate this into French.", text, "a"),
        Example.question_and_answer(1, "Translate this into German.", text, "b"),
        Example.question_and_answer(2, "translate this into german", text.upper(), "c"),
        Example.question_and_answer(3, "", text, "d"),
    ]
    assert left(examples, near) == [0, 1, 3]
    # A long instruction that all rows have does not make them alike.
    shared = "If you are the harbour master, please answer what the captain of the ship asks you."
    asked = ["May I anchor here?", "May I anchor there?", "may I anchor here"]
    rows = [Example.question_and_answer(n, shared, a, "Yes.") for n, a in enumerate(asked)]
    assert left(rows, near) == [0, 1]
    # The answer is compared wherever it stands, and in any script.
    answers = [conversation("x", s, number=n) for n, s in enumerate([*SENTENCES.values()] * 2)]
    by_answer = {"filter": "near_duplicates", "by": "answer"}
    assert left(answers, by_answer) == list(range(len(SENTENCES)))


def test_what_is_shown_names_the_earlier_row_and_never_rounds_up() -> None:
    words = [f"w{n}" for n in range(100)]
    examples = [row("", " ".join(words), 4), row("", " ".join([*words[:-1], "x"]), 9)]
    step = cleaned(examples, {"filter": "near_duplicates"}).funnel.filters[0]
    assert step.examples[0].row == 9
    assert step.examples[0].text.startswith("0.97 like row 5: w0 w1")  # 97 / 99
    assert similarity(examples[0].answer, examples[1].answer) == pytest.approx(97 / 99)


def test_rows_of_one_mould_are_not_all_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all rows share bands and none is near enough, each is compared with few."""
    monkeypatch.setattr(near_duplicates, "KEPT_OF_A_GROUP", 8)
    monkeypatch.setattr(near_duplicates, "COMPARED", 4)
    compared: list[int] = []
    real = near_duplicates.jaccard

    def counted(one: frozenset[bytes], other: frozenset[bytes]) -> float:
        compared.append(1)
        return real(one, other)

    monkeypatch.setattr(near_duplicates, "jaccard", counted)
    mould = " ".join(f"w{n}" for n in range(60))
    own = [" ".join(f"r{number}x{n}" for n in range(14)) for number in range(200)]
    examples = [row("", f"{mould} {text}", number) for number, text in enumerate(own)]
    assert 0.6 < similarity(examples[0].answer, examples[1].answer) < 0.85
    once = clean(filters({"filter": "near_duplicates"}), examples)
    assert len(once.examples) == 200
    assert len(compared) <= 4 * 200
    # A copy of the last of them is found all the same: it has every band in common.
    assert len(left([*examples[-5:], examples[-1]], {"filter": "near_duplicates"})) == 5


def test_without_the_library_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, asked in (
        ("datasketch", {"filter": "near_duplicates"}),
        ("ftfy", {"filter": "encoding", "repair": True}),
        ("py3langid.langid", {"filter": "language", "allow": ["en"]}),
    ):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(
            DataError, match=r"^the filter [a-z_]+ needs the package .*halfbyte\[clean\]"
        ):
            cleaned([], asked)


def test_real_rows(shared: Path) -> None:
    stored: list[dict[str, Any]] = json.loads((shared / "data" / "chatdoctor.json").read_text())
    stored = stored[:200] + stored[1650:1800]
    examples = [
        Example.question_and_answer(n, "", "", one["output"]) for n, one in enumerate(stored)
    ]
    expected = greedy(examples, 0.6)
    gone = set(range(len(examples))) - set(
        left(examples, {"filter": "near_duplicates", "by": "answer", "threshold": 0.6})
    )
    assert len(expected) >= 5
    assert gone <= expected.keys()
    assert len(gone) >= len(expected) - 1


def test_shingles_are_sequences_of_words() -> None:
    assert shingles_of("A b, c d", 3) == [b"a b c", b"b c d"]
    assert shingles_of("A b", 3) == [b"a b"]
    assert shingles_of(" .", 3) == []
    framed = shingles_of("a b c", 2, "frame")
    assert [one[16:] for one in framed] == [b"a b", b"b c"]
    assert {one[:16] for one in framed} != {one[:16] for one in shingles_of("a b c", 2, "other")}
