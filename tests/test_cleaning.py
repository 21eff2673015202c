"""Each filter: rows that must go, rows that must stay, and what all filters have in common."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cleaning_case import (
    SENTENCES,
    SPACED,
    cleaned,
    conversation,
    filters,
    left,
    row,
    rows,
)
from halfbyte.data.cleaning import clean
from halfbyte.data.cleaning.script import script_of
from halfbyte.data.cleaning.words import count_words, normalized
from halfbyte.data.example import Example, Message
from halfbyte.errors import DataError
from halfbyte.recipe.cleaning import Script

ENOUGH = "This answer stands here so that most of the answers begin with a capital."


# Copies.


def test_exact_duplicates_keep_the_first_of_each() -> None:
    examples = [
        row("Who?", "Ada.", 0),
        row("Who?", "Ada.", 1),
        row("Who?", "Grace.", 2),
        row("who", "Ada", 3),
        row("What?", "Ada.", 4),
        row("", "Ada.", 5),
        row("", "Grace.", 6),
    ]
    plain = {"filter": "exact_duplicates"}
    assert left(examples, plain) == [0, 2, 3, 4, 5, 6]
    assert left(examples, {**plain, "by": "question"}) == [0, 3, 4, 5, 6]
    assert left(examples, {**plain, "by": "answer"}) == [0, 2, 3]
    assert left(examples, {**plain, "normalize": True}) == [0, 2, 4, 5, 6]
    assert left(examples, {**plain, "by": "question", "normalize": True}) == [0, 4, 5, 6]


def test_a_row_is_the_same_only_with_the_same_roles_and_tools() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    call = {"name": "f", "arguments": {"x": 1}}
    examples = [
        conversation("A.", "B.", number=0),
        Example(1, (Message("system", "A."), Message("assistant", "B."))),
        conversation("A.", "B.", number=2, tools=(tool,)),
        Example(3, (Message("user", "A."), Message("assistant", "B.", tool_calls=(call,)))),
        Example(4, (Message("user", "A."), Message("assistant", "B.", reasoning="So."))),
        conversation("A.", "B.", number=5),
        Example(6, text="A.\n\nB."),
    ]
    assert left(examples, {"filter": "exact_duplicates"}) == [0, 1, 2, 3, 4, 6]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 5 - 3?", "What is 5 / 3?"),
        ("What is 5 * 3?", "What is 5 + 3?"),
        ("Is 3 < 5?", "Is 3 > 5?"),
        ("(a + b) * c", "a + b * c"),
        ("3.5", "35"),
        ("résumé", "resume"),
        ("你好", "你们好"),
    ],
)
def test_what_means_another_thing_is_not_made_equal(one: str, other: str) -> None:
    assert normalized(one) != normalized(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is  it?", "what is it"),
        ("STRASSE", "Straße"),
        ("“Yes,” he said.", "'yes' he said"),
        ("Ｈｅｌｌｏ！", "hello"),
        ("e\u0301te\u0301", "\u00e9t\u00e9"),
        ("渡轮中午出发。", "渡轮中午出发"),
    ],
)
def test_what_only_looks_different_is_made_equal(one: str, other: str) -> None:
    assert normalized(one) == normalized(other)


def test_overlap_takes_training_rows_and_no_others() -> None:
    held_out = [row("What is it?", "A ferry.", 90), row("", "No question.", 91)]
    examples = [
        row("what is IT", "A boat.", 0),
        row("What is that?", "A ferry.", 1),
        row("", "Nor here.", 2),
        row("What is it?", "a ferry", 3),
    ]
    overlap = {"filter": "overlap_with_held_out"}
    assert left(examples, overlap, held_out=held_out) == [1, 2]
    assert left(examples, {**overlap, "by": "answer"}, held_out=held_out) == [0, 2]
    assert left(examples, {**overlap, "by": "row"}, held_out=held_out) == [0, 1, 2]
    # Until rows are held out, the filter waits and is not in the funnel.
    waiting = cleaned(examples, overlap)
    assert len(waiting.examples) == 4
    assert waiting.funnel.filters == []


# Lengths and patterns.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("one two\nthree", 3),
        ("", 0),
        ("渡轮中午出发。", 6),
        ("フェリー 12 時", 6),
        ("हिन्दी में लिखा", 3),
        ("don't – x", 3),
    ],
)
def test_words_are_counted_in_any_script(text: str, words: int) -> None:
    # The ideographic full stop stays beside its last character.
    assert count_words(text) - text.count("。") == words


def test_length_bounds() -> None:
    examples = [
        row("one two three", "one", 0),
        row("one", "one two three four", 1),
        Example(2, text="one two"),
        Example(3, (Message("user", "x"), Message("assistant", "", tool_calls=({"name": "f"},)))),
        row("", "one two", 4),
    ]
    assert left(examples, {"filter": "length", "answer_min_words": 2}) == [1, 2, 3, 4]
    assert left(examples, {"filter": "length", "answer_max_words": 2}) == [0, 2, 3, 4]
    assert left(examples, {"filter": "length", "question_min_words": 1}) == [0, 1, 2, 3]
    assert left(examples, {"filter": "length", "question_max_characters": 3}) == [1, 2, 3, 4]
    assert left(examples, {"filter": "length", "answer_min_characters": 7}) == [1, 2, 3, 4]
    both = {"filter": "length", "answer_min_words": 2, "question_max_words": 2}
    assert left(examples, both) == [1, 2, 3, 4]


def test_a_pattern_drops_where_it_is_looked_for() -> None:
    examples = [
        row("Is it Chat Doctor?", "No.", 0),
        row("Who?", "Ask ChatDoctor.", 1),
        conversation("Hi", "I am Chat Doctor.", "Who?", "Nobody.", number=2),
        Example(3, text="chat doctor"),
        row("Who?", "A doctor.", 4),
    ]
    drop = {"filter": "pattern", "drop": "(?i)chat ?doctor"}
    assert left(examples, drop) == [0, 4]
    assert left(examples, {**drop, "field": "question"}) == [1, 2, 3, 4]
    assert left(examples, {**drop, "field": "row"}) == [4]


def test_a_pattern_replaces_in_each_message_and_nowhere_else() -> None:
    tool = Message("tool", "Mr. X", tool_call_id="1", name="f")
    messages = (
        Message("user", "I am Mr. X."),
        Message("assistant", "Mr. X, yes.", learn=False, reasoning="He is Mr. X."),
        tool,
        Message("assistant", "Bye, Mr. Y."),
    )
    before = [Example(7, messages, source=1), row("Mr. X?", "None.", 8)]
    replace = {"filter": "pattern", "replace": r"Mr\. (\w)", "replacement": r"<\1>"}
    after = cleaned(before, replace)
    assert [m.content for m in after.examples[0].messages] == [
        "I am Mr. X.",
        "<X>, yes.",
        "Mr. X",
        "Bye, <Y>.",
    ]
    assert after.examples[0].messages[1].reasoning == "He is <X>."
    assert after.examples[0].messages[1].learn is False
    assert (after.examples[0].row, after.examples[0].source) == (7, 1)
    assert after.examples[1] is before[1]
    assert after.examples[0].answer == "Bye, <Y>."
    step = after.funnel.filters[0]
    assert (step.dropped, step.changed, len(step.examples)) == (0, 1, 1)
    asked = cleaned(before, {**replace, "field": "question"}).examples
    assert asked[1].instruction == "<X>?"
    assert asked[0].messages[2].content == "<X>"
    assert asked[0].messages[1] == messages[1]


# Answers that are not whole.

WHOLE = [
    "Paris",
    "42",
    "The capital of France is Paris",
    "Yes, it is.",
    'He said "no"',
    "It ends well (see below)",
    "It costs 5 €",
    "That was fun 🎉",
    "Apples are good for you. Best wishes",
    "Apples are good for you.\n\nBest regards,\nAda Lovelace",
    "Apples are good for you.\nKind regards,",
    "You need:\n\n- flour\n- two eggs\n- a pinch of salt",
    "Do this in the order given here.\n1. Open the lid\n2) Close the lid again",
    "Use this:\n```python\nprint('hello')\n```",
    "| a | b |\n| --- | --- |\n| one | two |",
    "The boat is small, the bay is wide\nThe men are few who know its tide\nAnd fewer sail it",
    "def add(a, b):\n    total = a + b\n    return total",
    "x = 5 and so y = 7.",
    "**It is done.**",
    "See https://example.org/a?b=c",
    "Τι ώρα φεύγει το πλοίο;",
    "เรือเฟอร์รี่ออกเดินทางตอนเที่ยงวันและใช้เวลาประมาณสี่สิบนาทีในการไปถึงอีกฝั่งหนึ่งของอ่าว",
    "好的，谢谢。再见",
    *SENTENCES.values(),
]
CUT = [
    "The main treatments are surgery and radiation. The main treatments for this cancer are",
    "It is caused by a virus. You should, if it does not get better,",
    "You can do the following things:",
    "It is a well-",
    "It is a big (",
    "Use this:\n```python\nprint('hello')",
    "There is no need to worry about any of this and you can go on with what you do as",
    ", and so it goes on.",
    ") is the answer.",
    "ent of the disease is simple and takes no more than a week.",
    "n your case there is nothing to fear.",
    "Do this.\n1. Open the lid,",
    "渡轮中午出发，",
    "出发以前请你先到码头的窗口买票然后再去候船室等候广播通知",
]


def test_whole_answers_stay_and_cut_ones_go() -> None:
    many = [ENOUGH] * (10 * len(WHOLE))  # so that nine in ten begin with a capital
    examples = rows(*WHOLE, *CUT, *many)
    step = cleaned(examples, {"filter": "unfinished"})
    stayed = [example.answer for example in step.examples]
    wrongly = [text for text in WHOLE if text not in stayed and not text.startswith(("x ", "def"))]
    missed = [text for text in CUT if text in stayed]
    assert wrongly == []
    assert missed == []


@pytest.mark.parametrize("language", SPACED)
def test_the_same_answer_is_whole_and_then_cut(language: str) -> None:
    whole = SENTENCES[language]
    first, second = re.split(r"(?<=[.?!।։።]) ", whole, maxsplit=1)
    for cut in (f"{first} {' '.join(second.split()[:4])}", f"{first} {second.split()[0]},"):
        examples = rows(whole, cut)
        kept = left(examples, {"filter": "unfinished", "sign_off_words": 0})
        assert kept == [0], cut


def test_a_small_letter_begins_in_the_middle_where_most_answers_have_a_capital() -> None:
    small = "this one does not begin with a capital."
    few = rows(*[ENOUGH] * 20, small)
    half = rows(*[ENOUGH] * 2, small, small)
    assert left(few, {"filter": "unfinished"}) == list(range(20))
    assert len(left(few, {"filter": "unfinished", "start": "any"})) == 21
    assert len(left(half, {"filter": "unfinished"})) == 4
    assert left(half, {"filter": "unfinished", "start": "upper"}) == [0, 1]
    odd = rows("iPhone and iPad.", "x = 5.", "f(x) is 3.", "e.g. this.", "a boat.", "n time.")
    assert left(odd, {"filter": "unfinished", "start": "upper"}) == [0, 1, 2, 3]


def test_what_is_said_beside_a_call_need_not_be_whole() -> None:
    call = Message("assistant", "Let me look that up for you,", tool_calls=({"name": "f"},))
    asked = Message("user", "and, of course,")
    done = Message("assistant", "It is noon.")
    broken = Message("assistant", "It is noon and then it will be")
    examples = [
        Example(0, (asked, call, Message("tool", "noon,"), done)),
        Example(1, (asked, broken, asked, done)),
        Example(2, (asked, done)),
    ]
    assert left(examples, {"filter": "unfinished", "start": "any"}) == [0, 1, 2]
    longer = Message("assistant", f"{done.content} {broken.content}")
    examples[1] = Example(1, (asked, longer, asked, done))
    assert left(examples, {"filter": "unfinished", "start": "any"}) == [0, 2]


# Scripts, languages, encodings.


SIGNS = "\u0374\u0640\u3006\u303b\ua9cf\uff9e\uff9f\U00016fe3"


def test_scripts_are_those_of_unicode() -> None:
    regex = pytest.importorskip("regex")
    names = list(Script.__args__)
    properties = {name: "Nko" if name == "NKo" else name for name in names}
    wrong = []
    for name in names:
        expression = regex.compile(rf"\p{{Script={properties[name]}}}")
        for point in range(0x20, 0x323B0):
            character = chr(point)
            if not character.isalpha():
                continue
            known, told = expression.match(character) is not None, script_of(character) == name
            if known != told:
                wrong.append((name, character, script_of(character)))
    # Modifier letters are of no script here, and Unicode has some of Latin. What else differs are
    # signs: numerals, iteration and sound marks.
    assert all(told is None for _, character, told in wrong if character not in SIGNS)
    assert len(wrong) < 200


def test_script_keeps_what_is_allowed_and_single_symbols() -> None:
    examples = rows(*SENTENCES.values(), "The β of a µ is in Ω, of course.", "42!", "")
    latin = left(examples, {"filter": "script", "allow": ["Latin"], "field": "answer"})
    names = [*SENTENCES, "greek", "number", "empty"]
    expected = {"en", "fr", "de", "es", "pt", "pl", "cs", "tr", "vi", "greek", "number", "empty"}
    assert {names[n] for n in latin} == expected
    japanese = {"filter": "script", "allow": ["Han", "Hiragana", "Katakana"], "field": "answer"}
    assert {names[n] for n in left(examples, japanese)} == {"zh", "ja", "number", "empty"}
    # Of a row the question is looked at by itself.
    asked = [row(SENTENCES["ru"], SENTENCES["en"] * 9, 0), row(SENTENCES["en"], "Да нет же", 1)]
    assert left(asked, {"filter": "script", "allow": ["Latin"]}) == []
    assert left(asked, {"filter": "script", "allow": ["Latin"], "field": "answer"}) == [0]
    mixed = rows("Hello мир мир мир")
    assert left(mixed, {"filter": "script", "allow": ["Latin"], "min_share": 0.3}) == [0]


def test_language_keeps_what_is_allowed_and_what_cannot_be_told() -> None:
    pytest.importorskip("py3langid")
    short, code = "Nein danke", "x = [n for n in range(3)]\nprint(x)"
    examples = rows(*SENTENCES.values(), short, code)
    names = [*SENTENCES, "short", "code"]
    for allowed in (["en"], ["de", "fr"], ["ja"]):
        kept = left(examples, {"filter": "language", "allow": allowed, "min_letters": 20})
        assert {names[n] for n in kept} == {*allowed, "short", "code"}
    with pytest.raises(DataError, match=r"cannot tell xx from others"):
        cleaned(examples, {"filter": "language", "allow": ["xx"]})


def damaged(text: str) -> str:
    """UTF-8 read as Windows-1252, its five undefined bytes as Latin-1."""
    return "".join(
        bytes([byte]).decode("cp1252" if byte not in b"\x81\x8d\x8f\x90\x9d" else "latin-1")
        for byte in text.encode()
    )


QUOTED = "“It’s a naïve café – really”… 5 € for 20 °C 😀"


@pytest.mark.parametrize("text", [*(s for s in SENTENCES.values() if not s.isascii()), QUOTED])
def test_damaged_text_is_found_and_repaired(text: str) -> None:
    pytest.importorskip("ftfy")
    for broken in (damaged(text), text.encode().decode("latin-1")):
        examples = rows(text, broken)
        assert left(examples, {"filter": "encoding"}) == [0]
        mended = cleaned(examples, {"filter": "encoding", "repair": True})
        # ftfy knows nothing of Armenian: what cannot be mended is dropped.
        answers = [example.answer for example in mended.examples]
        assert answers == [text, text] or (text == SENTENCES["hy"] and answers == [text])


@pytest.mark.parametrize(
    "text",
    [
        *SENTENCES.values(),
        QUOTED,
        "„Spaß“ und «bébé…» – «MANHÃ», “NÃO”… ROMÂ.",
        "a\tb\r\nc\x0cd",
        "Ångström, Ärger, Øre, œuvre, ÿ, ñandú, ¿qué?",
        "x² ± 3 µm · ½ ¼ §4 ©2020 ®",
        "👩‍👩‍👧 🇫🇷 \u200b\u200e",
    ],
)
def test_sound_text_is_left_alone(text: str) -> None:
    assert left(rows(text), {"filter": "encoding"}) == [0]


@pytest.mark.parametrize("text", ["a\ufffdb", "a\x00b", "a\x07b", "a\x9db", "a\ud83d", "b\ufeffc"])
def test_lost_characters_are_found(text: str) -> None:
    examples = [row(f"{text}?", "Yes.", 0), row("What?", "Yes.", 1)]
    assert left(examples, {"filter": "encoding"}) == [1]
    assert left(examples, {"filter": "encoding", "field": "answer"}) == [0, 1]


# What all filters have in common.

TEXTS = st.one_of(
    st.sampled_from([*WHOLE, *CUT, *map(damaged, list(SENTENCES.values())[:6]), "", " ", "x"]),
    st.text(max_size=40),
)
EXAMPLES = st.one_of(
    st.builds(row, TEXTS, TEXTS),
    st.builds(conversation, TEXTS, TEXTS, TEXTS, TEXTS),
    st.builds(lambda text: Example(0, text=text), TEXTS),
)
FILTERS: list[dict[str, Any]] = [
    {"filter": "exact_duplicates"},
    {"filter": "exact_duplicates", "by": "question", "normalize": True},
    {"filter": "near_duplicates", "threshold": 0.6},
    {"filter": "length", "answer_min_words": 2, "question_max_characters": 60},
    {"filter": "pattern", "drop": "(?i)ferr"},
    {"filter": "pattern", "field": "row", "replace": "[aeiou]+", "replacement": "*"},
    {"filter": "unfinished", "start": "upper"},
    {"filter": "unfinished", "start": "any"},
    {"filter": "script", "allow": ["Latin", "Han"]},
    {"filter": "encoding"},
    {"filter": "encoding", "repair": True},
    {"filter": "overlap_with_held_out", "by": "answer"},
]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(EXAMPLES, max_size=12),
    st.lists(st.sampled_from(FILTERS), max_size=4),
    st.lists(EXAMPLES, max_size=2),
)
def test_counts_add_up_order_is_kept_and_a_second_time_changes_nothing(
    made: list[Example], chosen: list[dict[str, Any]], held_out: list[Example]
) -> None:
    pytest.importorskip("datasketch")
    pytest.importorskip("ftfy")
    examples = [Example(n, e.messages, e.text, e.instruction, e.input) for n, e in enumerate(made)]
    once = clean(filters(*chosen), examples, held_out)
    numbers = [example.row for example in once.examples]
    assert numbers == sorted(set(numbers))
    funnel = once.funnel
    assert (funnel.rows_in, funnel.rows_out) == (len(examples), len(numbers))
    coming = len(examples)
    for step in funnel.filters:
        assert step.rows_in == coming
        coming -= step.dropped
        assert len(step.examples) == min(3, step.dropped + step.changed)
        assert all(shown.row < len(examples) for shown in step.examples)
    assert coming == funnel.rows_out
    for single in chosen:  # one filter after another may give the earlier one new work
        alone = clean(filters(single), examples, held_out)
        again = clean(filters(single), alone.examples, held_out)
        assert list(again.examples) == list(alone.examples)
        assert again.funnel.dropped == 0
    drops = [f for f in chosen if "replace" not in f and "repair" not in f]
    both = clean(filters(*drops), examples, held_out)
    again = clean(filters(*drops), both.examples, held_out)
    assert list(again.examples) == list(both.examples)


def test_private_data_is_hidden_in_what_is_shown() -> None:
    step = cleaned(rows("x", "Write to ada@byron.net"), {"filter": "length", "answer_max_words": 2})
    assert "ada@byron" not in step.funnel.filters[0].examples[0].text
    assert step.funnel.filters[0].examples[0].row == 1
