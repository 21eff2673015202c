"""The commands of a chat: undo, again, variants, seeds, and conversations in files."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from halfbyte.cli.app import app
from halfbyte.cli.chat_answer import ChatSettings
from halfbyte.cli.chat_files import load_conversation, save_conversation
from halfbyte.cli.chat_session import Session
from halfbyte.errors import DataError
from halfbyte.finished import open_adapter
from halfbyte.finished.rows import held_out_rows
from halfbyte.generate.conversation import Conversation
from talk_case import INSTRUCTION_FORMAT, chatml, expected, make_run, on_screen, said, talk


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("commands_run"), tiny_model, "chat")


@pytest.fixture(scope="module")
def opened(chat_run: Path) -> Any:
    return open_adapter(chat_run, device="cpu")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_undo_takes_the_last_turn_away(opened: Any) -> None:
    first = expected(opened, chatml("One"))
    then = expected(opened, chatml("One", first, "Two"))
    shown = talk(opened, "One", "Two", "/undo", "Two", "/undo", "/again", "/undo", "/undo")
    assert said(shown) == on_screen(first, then, then, first)
    assert shown.count("nothing to undo") == 1


def test_an_answer_is_drawn_anew_where_it_is_drawn(opened: Any) -> None:
    lines = ("/temperature 1.5", "/seed 5", "One", "/again", "/seed 5", "/again")
    first, second, third = said(talk(opened, *lines))
    assert first == third != second
    assert "/temperature 0.7 draws them anew" in talk(opened, "One", "/again")
    assert "draws them anew" not in talk(opened, "One", "/base", "/again")
    assert talk(opened, "/seed", "/seed -1", "/seed x").count("whole number") == 2


def test_a_failed_answer_leaves_the_one_that_was_there(opened: Any) -> None:
    first = expected(opened, chatml("One"))
    then = expected(opened, chatml("One", first, "Two"))
    tokenizer, own = opened.tokenizer, opened.tokenizer.chat_template
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    session = Session(opened, ChatSettings(max_new_tokens=12), console, read=input)
    session._answer("One")
    try:
        tokenizer.chat_template = "{{ raise_exception('no') }}"
        session.talk.conversation._chat = Conversation(tokenizer, room=9, count=len)._chat
        session._answer_again()
    finally:
        tokenizer.chat_template = own
    assert "does not take this conversation" in " ".join(shown.getvalue().split())
    session.talk.conversation._chat = Conversation(tokenizer, room=9, count=len)._chat
    session._answer("Two")
    assert session.talk.conversation.said[-1].answered == then


def test_a_saved_conversation_is_gone_on_with_and_trained_on(opened: Any, tmp_path: Path) -> None:
    first = expected(opened, chatml("Ünö\nand two", system="Be brief."))
    then = expected(opened, chatml("Ünö\nand two", first, "Two", system="Be brief."))
    lines = ("/system Be brief.", "Ünö\\", "and two", "/save good.jsonl")
    assert "saved: good.jsonl" in talk(opened, *lines)
    assert said(talk(opened, "/load good.jsonl", "Two")) == on_screen(then)

    (row,) = (
        json.loads(line) for line in (tmp_path / "good.jsonl").read_text("utf-8").split("\n")[:-1]
    )
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][-1]["content"] == first
    held = held_out_rows(opened.found, opened.source, data=str(tmp_path / "good.jsonl"))
    assert held.template.prompt(held.rows[0]) == chatml("Ünö\nand two", system="Be brief.")
    learned = held.pieces[0].input_ids[held.pieces[0].loss_mask]
    assert opened.tokenizer.decode(learned).rstrip("\n") == f"{first}<|im_end|>"


def test_saving_takes_no_file_away(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "talk.md").write_text("mine")
    shown = talk(
        opened, "/save talk.md", "One", "/save talk.md", "/save talk.md", "/save", "/save x.txt"
    )
    assert "nothing to save" in shown
    assert "saved: talk-2.md (talk.md is there already)" in shown
    assert "saved: talk-3.md" in shown
    assert "neither .md nor .jsonl" in shown
    assert (tmp_path / "talk.md").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("conversation.jsonl", "talk-2.md", "talk-3.md", "talk.md")
    ]
    text = (tmp_path / "talk-2.md").read_text("utf-8")
    assert "## You\n\nOne\n\n## adapter\n\n" in text
    assert expected(opened, chatml("One")).strip() in text
    assert "cannot be written" in talk(opened, "One", "/save nowhere/x.md", "/save a\0.md")


def test_what_is_no_conversation_is_said(opened: Any, tmp_path: Path) -> None:
    rows = {
        "tool.jsonl": [{"role": "tool", "content": "x"}],
        "twice.jsonl": [{"role": "user", "content": "x"}] * 2,
        "empty.jsonl": [],
        "number.jsonl": [{"role": "user", "content": 7}],
    }
    for name, messages in rows.items():
        (tmp_path / name).write_text(json.dumps({"messages": messages}))
        with pytest.raises(DataError, match=f"line 1 of .*{name}"):
            load_conversation(tmp_path / name, all_rows=False)
    deep = tmp_path / "deep.jsonl"
    deep.write_text("[" * 100_000)
    shown = talk(
        opened, "One", *(f"/load {name}" for name in rows), "/load deep.jsonl", "/load x.md"
    )
    assert shown.count("is no conversation") == 5
    assert "/load wants" in talk(opened, "/load", "/load no.jsonl", "/load ~nobody-here/x.jsonl")
    # What could not be loaded has changed nothing.
    then = said(talk(opened, "One", "/load tool.jsonl", "Two"))[-1:]
    assert then == on_screen(
        expected(opened, chatml("One", expected(opened, chatml("One")), "Two"))
    )


def test_a_question_without_an_answer_is_answered(opened: Any, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "One"}]}
    (tmp_path / "open.jsonl").write_text(
        json.dumps({"messages": rows_of("x")}) + "\n" + json.dumps(row)
    )
    shown = talk(opened, "Zero", "/load open.jsonl", "/again")
    assert said(shown)[-1:] == on_screen(expected(opened, chatml("One")))
    assert "the last of 2 conversations in the file, in place of the 1 turn so far" in shown


def rows_of(*said: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for text in said for role in ("user", "assistant")]


def test_single_questions_are_saved_as_rows_of_their_own(tmp_path: Path, tiny_model: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model, INSTRUCTION_FORMAT)
    single = open_adapter(run, device="cpu")
    talk(single, "One", "Two", "/again", "/save")
    lines = (tmp_path / "conversation.jsonl").read_text().splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    assert [[m["content"] for m in row][:1] for row in rows] == [["One"], ["Two"]]
    assert "loaded: 2 turns" in talk(single, "/load conversation.jsonl")


def test_long_conversations_are_saved_whole(opened: Any, tmp_path: Path) -> None:
    kept = Conversation(opened.tokenizer, room=40, count=len)
    for number in range(4):
        kept.prompt(f"Message {number}")
        kept.add(f"Message {number}", "Answer")
    assert kept.turns < 4
    written = save_conversation(tmp_path / "long.jsonl", kept, "model")
    assert len(load_conversation(written, all_rows=False).turns) == 4


def test_variants_are_used_by_name(opened: Any) -> None:
    adapted, base = (expected(opened, chatml("One"), adapter=on) for on in (True, False))
    shown = talk(opened, "/use", "/use step-7", "/use base", "One", "/base", "/again")
    assert "adapter answers; there are base, adapter" in shown
    assert "there is no step-7" in shown
    assert said(shown) == on_screen(base, adapted)


def test_an_adapter_from_elsewhere_is_talked_with(
    chat_run: Path, opened: Any, tiny_model: Path, tmp_path: Path
) -> None:
    elsewhere = shutil.copytree(chat_run / "adapter", tmp_path / "theirs")
    config = json.loads((elsewhere / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/nowhere/model"
    (elsewhere / "adapter_config.json").write_text(json.dumps(config))
    words = ["chat", str(elsewhere), "--device", "cpu", "--max-new-tokens", "12"]
    missing = CliRunner().invoke(app, words, input="One\n")
    assert missing.exit_code == 2
    assert "--base" in missing.stderr
    done = CliRunner().invoke(app, [*words, "--base", str(tiny_model)], input="One\n")
    assert done.exit_code == 0, done.output
    other = open_adapter(elsewhere, base=str(tiny_model), device="cpu")
    assert done.stdout == expected(other, chatml("One")) + "\n"
    # And it is theirs that answers: without its B it is the base.
    weights = load_file(elsewhere / "adapter_model.safetensors")
    zero = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in weights.items()}
    save_file(zero, elsewhere / "adapter_model.safetensors", metadata={"format": "pt"})
    bare = CliRunner().invoke(app, [*words, "--base", str(tiny_model)], input="One\n")
    assert bare.stdout == expected(other, chatml("One"), adapter=False) + "\n" != done.stdout
