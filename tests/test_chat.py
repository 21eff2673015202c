"""``halfbyte chat`` on a run folder of a tiny model: in a pipe and as in a terminal."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from typer.testing import CliRunner

from halfbyte.cli.word_wrap import WordWrap
from halfbyte.generate.conversation import Conversation
from talk_case import INSTRUCTION_FORMAT, chatml, expected, make_run, on_screen, said, talk


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("chat_run"), tiny_model, "chat")


@pytest.fixture(scope="module")
def instruction_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("instruction_run"), tiny_model, INSTRUCTION_FORMAT)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def answerer(chat_run: Path) -> Any:
    from halfbyte.finished import open_adapter

    return open_adapter(chat_run, device="cpu")


def invoke(run: Path, text: str, *options: str) -> Any:
    from halfbyte.cli.app import app

    return CliRunner().invoke(app, ["chat", str(run), *options], input=text)


def test_in_a_pipe_only_the_answer_is_printed(chat_run: Path, answerer: Any) -> None:
    done = invoke(chat_run, "Say 3.\n\nIn words.\n", "--max-new-tokens", "12", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert done.stdout == expected(answerer, chatml("Say 3.\n\nIn words.")) + "\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("  \n", [], "standard input is empty"),
        ("", [], "standard input is empty"),
        ("Hi", ["--device", "tpu"], "--device tpu"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    chat_run: Path, text: str, options: list[str], says: str
) -> None:
    done = invoke(chat_run, text, *options)
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_broken_template_is_one_sentence(tmp_path: Path, tiny_model: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model, "chat")
    for template, says in (("{% if %}", "line 1"), ("{{ raise_exception('no users') }}", "no us")):
        (run / "adapter" / "chat_template.jinja").write_text(template)
        done = invoke(run, "Hi", "--device", "cpu")
        assert done.exit_code == 2
        assert says in done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""


def test_a_conversation_goes_on(answerer: Any) -> None:
    first = expected(answerer, chatml("One"))
    second = expected(answerer, chatml("One", first, "Two"))
    alone = expected(answerer, chatml("Two"))
    assert second != alone
    shown = talk(answerer, "One", "Two", "/clear", "Two")
    assert said(shown) == on_screen(first, second, alone)


def test_the_base_can_be_compared(answerer: Any) -> None:
    adapted = expected(answerer, chatml("One"))
    base = expected(answerer, chatml("One"), adapter=False)
    assert adapted != base
    shown = talk(answerer, "One", "/base", "/again", "/base", "/again")
    assert said(shown) == on_screen(adapted, base, adapted)


def test_a_system_message_can_be_set_and_taken_away(answerer: Any) -> None:
    given = talk(answerer, "/system Be brief.", "One", "/clear", "/system", "One")
    assert said(given) == on_screen(
        expected(answerer, chatml("One", system="Be brief.")),
        expected(answerer, chatml("One")),
    )
    assert said(talk(answerer, "One", system="Be brief.")) == said(given)[:1]


def test_a_message_can_have_several_lines(answerer: Any) -> None:
    (whole,) = on_screen(expected(answerer, chatml("One\nTwo")))
    assert said(talk(answerer, "One\\", "Two")) == [whole]
    assert said(talk(answerer, '"""', "One", "Two", '"""')) == [whole]
    assert said(talk(answerer, '"""One', 'Two"""')) == [whole]
    # Within quotes a slash begins no command.
    assert said(talk(answerer, '"""/help"""')) == on_screen(expected(answerer, chatml("/help")))


def test_each_message_stands_alone_in_an_instruction_format(instruction_run: Path) -> None:
    from halfbyte.finished import open_adapter

    single = open_adapter(instruction_run, device="cpu")
    prompt = "### Instruction:\n{}\n\n### output:\n"
    shown = talk(single, "One", "Two")
    answers = [expected(single, prompt.format(text)) for text in ("One", "Two")]
    assert said(shown) == on_screen(*answers)
    assert shown.count("a conversation of its own") == 1


def test_old_turns_go_when_the_model_takes_no_more(answerer: Any) -> None:
    long = "Ü " * 40
    tokens = len(answerer.tokenizer(chatml(long)).input_ids)
    assert 256 - 12 > tokens > (256 - 12) / 2, "one fits, two do not"
    shown = talk(answerer, "One", "Two", long, long)
    assert shown.count("the oldest turn was dropped") == 0
    assert shown.count("the oldest 3 turns were dropped") == 1
    assert said(shown)[-1:] == on_screen(expected(answerer, chatml(long)))
    too_long = talk(answerer, long * 4)
    assert "too long for the model" in too_long


def test_sampling_is_repeated_by_the_seed(answerer: Any) -> None:
    lines = ["/temperature 1.5", "One", "/clear", "One"]
    first, again, other = (said(talk(answerer, *lines, seed=seed)) for seed in (5, 5, 6))
    assert first == again != other
    assert first[0] != first[1], "the same message twice draws anew"
    assert "wants a number" in talk(answerer, "/temperature warm")


def test_ctrl_c_stops_the_answer_and_twice_leaves(
    answerer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.cli import chat_session

    (whole,) = on_screen(expected(answerer, chatml("Say the number 3.")))
    original: Callable[..., Any] = chat_session.answer_message

    def interrupted(*args: Any) -> Any:
        given = args[-1]

        def once(piece: str) -> None:
            given(piece)
            raise KeyboardInterrupt

        return original(*args[:-1], once)

    monkeypatch.setattr(chat_session, "answer_message", interrupted)
    shown = talk(answerer, "Say the number 3.", KeyboardInterrupt, "never read")
    assert talk.left == ["never read", EOFError]  # type: ignore[attr-defined]
    assert "stopped" in shown
    part = said(shown)[0]
    assert whole.startswith(part)
    assert part != whole
    monkeypatch.undo()
    # Anything between the two, and it was not twice.
    assert said(talk(answerer, KeyboardInterrupt, "Say the number 3.", KeyboardInterrupt)) == [
        whole
    ]
    assert talk.left == []  # type: ignore[attr-defined]
    assert said(talk(answerer, "/quit", "One")) == []


def test_a_models_escape_codes_do_nothing(answerer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.cli import chat_session

    def hostile(_: Any, __: str, ___: Any, on_text: Callable[[str], None]) -> Any:
        on_text("\x1b[2J")
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_session, "answer_message", hostile)
    assert "\x1b" not in talk(answerer, "One")


def test_a_format_without_a_system_message_says_so(answerer: Any) -> None:
    tokenizer = answerer.tokenizer
    own = tokenizer.chat_template
    users = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    try:
        tokenizer.chat_template = users
        assert "no place for a system message" in talk(answerer, "/system Be brief.")
    finally:
        tokenizer.chat_template = own
    assert Conversation(tokenizer, room=9, count=len).takes_system()


@pytest.mark.parametrize("width", range(11, 40))
@pytest.mark.parametrize("size", [1, 3, 12])
def test_lines_are_broken_between_words(width: int, size: int) -> None:
    text = "The keeper said: a lamp, a log and a steady-hand hold more than luck, shipmate."
    lines = wrapped(text, width, size).split("\n")
    assert [line.rstrip() for line in lines] == textwrap.wrap(text, width, break_on_hyphens=False)
    assert all(len(line) <= width for line in lines)

    own = "One:\n\n-  two\n\tthree"
    assert wrapped(own, 40, size) == own.replace("\t", "    "), "the text's own lines stay"
    assert wrapped(own, 10, size, column=7).startswith("\nOne:\n")


@pytest.mark.parametrize("size", [1, 3, 12])
def test_scripts_without_spaces_and_long_words_fill_their_lines(size: int) -> None:
    text = "ein 世界你好世界你好 zwei"
    lines = wrapped(text, 9, size).split("\n")
    assert [cell_len(line) for line in lines] == [8, 8, 9]
    assert "".join(lines) == text
    link = "see https://a.example/page and so"
    rows = "".join(line.ljust(10) for line in wrapped(link, 10, size).split("\n"))
    assert " https://a.example/page and so" in rows


def wrapped(text: str, width: int, size: int, column: int = 0) -> str:
    """``text`` as WordWrap writes it when it comes in pieces of ``size`` characters."""
    written = io.StringIO()
    wrap = WordWrap(written.write, width, column)
    for start in range(0, len(text), size):
        wrap.push(text[start : start + size])
    wrap.end()
    return written.getvalue()
