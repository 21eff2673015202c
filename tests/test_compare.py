"""``halfbyte compare``: the same prompts to base, checkpoints and adapters, side by side."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest

from command_line import halfbyte
from halfbyte.errors import DataError, RunError
from halfbyte.finished import comparing
from halfbyte.finished.found import find_adapter
from halfbyte.finished.opened import OpenedAdapter, open_adapter
from halfbyte.finished.prompt_file import read_prompts
from halfbyte.finished.rows import held_out_rows
from halfbyte.finished.variants import use_variant, variant_names
from halfbyte.report.side_by_side import (
    Asked,
    Column,
    Said,
    SideBySide,
    read_beside,
    read_record,
    side_by_side,
)
from halfbyte.report.side_by_side_page import side_by_side_page
from page_reader import read_page
from talk_case import INSTRUCTION_FORMAT, chatml, expected, make_run

HOSTILE = "<script>alert(1)</script><img src=x onerror=y> \x1b[2J\u202eabc"


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "run"
    settings = ["data.held_out=5", "training.epochs=2", "training.learning_rate=0.02"]
    settings += ["checkpoints.every_steps=2", "checkpoints.keep_last=2", "precision=fp32"]
    settings += ["training.batch_size=4", "evaluation.keep=last"]
    halfbyte(
        *("train", "--model", tiny_model, "--data", tiny_rows, "--out", folder),
        *(word for setting in settings for word in ("--set", setting)),
    )
    return folder


def in_transformers(opened: OpenedAdapter, variant: str, prompt: str) -> str:
    with use_variant(opened, variant):
        return expected(opened, prompt, adapter=variant != "base", new=10)


def test_variants_of_a_run_are_laid_side_by_side(run: Path, tmp_path: Path) -> None:
    words = ("compare", run, "--max-new-tokens", "10", "--rows", "3", "--device", "cpu")
    done = halfbyte(*words)
    seen = read_record(run / "evaluation" / "side_by_side.json")
    names = [column.name for column in seen.columns]
    assert names[0] == "base"
    assert names[-1] == "adapter"
    # Two checkpoints were kept, of which the last one is the adapter.
    assert len(names) == 3
    assert names[1] == variant_names(find_adapter(run))[1]
    assert len({column.identity for column in seen.columns}) == len(names)

    opened = open_adapter(run, device="cpu")
    held = held_out_rows(opened.found, opened.source)
    rows = {row.at: row for row in held.rows}
    assert len(seen.asked) == 3 < len(rows)
    for asked in seen.asked:
        row = rows[asked.title]
        prompt = chatml(held.template.question(row))
        assert asked.reference == row.answer
        for name, answer in zip(names, asked.answers, strict=True):
            assert answer.prompt == prompt
            assert answer.text == in_transformers(opened, name, prompt)
    assert done.stdout.count("base") >= 3
    assert str(run / "evaluation" / "side_by_side.html") in done.stdout

    page = read_page(run / "evaluation" / "side_by_side.html")
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe"}
    for asked in seen.asked:
        assert " ".join(asked.question.split()) in " ".join(page.text.split())
    report = read_page(run / "report.html")
    assert "Answers side by side" in report.text
    assert "Answers side by side" in (run / "report.md").read_text("utf-8")
    # The same seed draws the same rows, and another page beside it changes nothing else.
    halfbyte(*words, "--variants", "adapter,base", "--out", tmp_path / "page.html")
    again = read_record(tmp_path / "page.json")
    assert [column.name for column in again.columns] == ["base", "adapter"]
    assert [one.answers[0] for one in again.asked] == [
        Said(a.text, a.tokens, a.ended, b.seconds, a.prompt)
        for a, b in zip(
            (one.answers[0] for one in seen.asked),
            (one.answers[0] for one in again.asked),
            strict=True,
        )
    ]


def test_several_adapters_are_asked_one_after_the_other(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = make_run(tmp_path / "chat", tiny_model, "chat")
    single = make_run(tmp_path / "single", tiny_model, INSTRUCTION_FORMAT)
    elsewhere = shutil.copytree(chat / "adapter", tmp_path / "theirs")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Say 3\nin words.\n\n\nAnd 4?\n")
    alive: list[Any] = []

    def one_at_a_time(*args: Any, **settings: Any) -> OpenedAdapter:
        gc.collect()
        assert [model for model in alive if model() is not None] == []
        opened = open_adapter(*args, **settings)
        alive.append(weakref.ref(opened.qlora.network))
        return opened

    monkeypatch.setattr(comparing, "open_adapter", one_at_a_time)
    monkeypatch.chdir(tmp_path)
    halfbyte(
        *("compare", chat, single, elsewhere, "--prompts", prompts, "--max-new-tokens", "10"),
        *("--device", "cpu", "--variants", "base,adapter"),
    )
    assert len(alive) == 3
    seen = read_record(tmp_path / "evaluation" / "side_by_side.json")
    assert [column.name for column in seen.columns] == [
        *("chat base", "chat", "single base", "single", "theirs base", "theirs")
    ]
    first = "Say 3\nin words."
    assert [asked.question for asked in seen.asked] == [first, "And 4?"]
    prompt = INSTRUCTION_FORMAT.partition("{output}")[0].format(instruction=first)
    assert [answer.prompt for answer in seen.asked[0].answers] == [
        *[chatml(first)] * 2,
        *[prompt] * 2,
        *[chatml(first)] * 2,
    ]
    for folder, place in ((chat, 0), (single, 2), (elsewhere, 4)):
        opened = open_adapter(folder, device="cpu")
        for variant, answer in zip(
            ("base", "adapter"), seen.asked[0].answers[place : place + 2], strict=True
        ):
            assert answer.text == in_transformers(opened, variant, answer.prompt)
    assert not (chat / "evaluation").exists(), "of several runs none is written into"


def record(*texts: str, question: str = "Why?") -> SideBySide:
    columns = [Column(f"model {n}", HOSTILE, str(n)) for n in range(len(texts))]
    answers = [Said(text, 4, n % 2 == 0, 0.1, "p") for n, text in enumerate(texts)]
    asked = [Asked("row 1", question, HOSTILE, answers)]
    return SideBySide(columns, asked, HOSTILE, 0, 4, 0.0, "1")


def test_what_models_say_is_no_markup(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    mail = "write to jane.doe@hospital-berlin.de"
    path.write_text(side_by_side_page(record(HOSTILE, mail, question=HOSTILE)), "utf-8")
    page = read_page(path)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe"}
    assert page.text.count("<script>alert(1)</script>") >= 4
    assert "\x1b" not in page.text
    assert "jane.doe" not in page.text
    assert "prefers-color-scheme: dark" in path.read_text("utf-8")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"question"', '"asked"'),
        lambda text: json.dumps({**json.loads(text), "columns": []}),
        lambda text: "[" * 100_000,
    ],
)
def test_a_damaged_record_is_a_sentence_of_the_report(tmp_path: Path, change: Any) -> None:
    from halfbyte.report.side_by_side import to_json

    folder = tmp_path / "evaluation"
    folder.mkdir()
    assert side_by_side(read_beside(tmp_path)) == []
    whole = to_json(record("a", "b"))
    (folder / "side_by_side.json").write_text(whole)
    assert read_record(folder / "side_by_side.json") == record("a", "b")
    assert len(side_by_side(read_beside(tmp_path))) > 2
    (folder / "side_by_side.json").write_text(change(whole))
    with pytest.raises(RunError, match=r"side_by_side\.json"):
        read_record(folder / "side_by_side.json")
    said = read_beside(tmp_path)
    assert isinstance(said, str)
    assert str(tmp_path) not in said, "a report names no folder of this machine"
    assert len(side_by_side(said)) == 2


def test_prompts_are_read_in_their_forms(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    lines = ["One", {"prompt": "Two"}, {"messages": turns}, {"question": "Four", "answer": "x"}]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert [messages for _, messages in read_prompts(path)] == [
        [{"role": "user", "content": "One"}],
        [{"role": "user", "content": "Two"}],
        turns[:2],
        [{"role": "user", "content": "Four"}],
    ]
    for line in ("7", '{"x": 1}', '{"messages": [{"role": "tool", "content": "x"}]}', "{", '"  "'):
        path.write_text(f'"One"\n{line}')
        with pytest.raises(DataError, match=r"line 2 of .*prompts\.jsonl is no prompt"):
            read_prompts(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        read_prompts(path)


def test_what_is_wrong_is_one_sentence(run: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    for words, says in (
        (("--variants", "step-999"), "has no variant step-999; it has base, step-"),
        (("--out", "page.pdf"), "must end in .html"),
        (("--prompts", empty), "holds no prompt"),
        (("--prompts", tmp_path / "none.txt"), "cannot be read"),
        (("--prompts", empty, "--data", empty), "leave one out"),
        (("--device", "tpu"), "none of auto, cpu and cuda"),
        (("--blind", "--variants", "base"), "two models that differ"),
    ):
        done = halfbyte("compare", run, *words, code=2)
        assert says in done.stderr
        assert done.stderr.count("\n") == 1
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "evaluation", ignore_errors=True)
    (tmp_path / "outside").mkdir()
    (copy / "evaluation").symlink_to(tmp_path / "outside")
    assert "is a link" in halfbyte("compare", copy, code=2).stderr
    assert "neither a run folder" in halfbyte("compare", tmp_path / "outside", code=2).stderr
    assert not [*(tmp_path / "outside").iterdir()]
    elsewhere = shutil.copytree(run / "adapter", tmp_path / "theirs")
    assert "name prompts with --prompts" in halfbyte("compare", elsewhere, code=2).stderr
