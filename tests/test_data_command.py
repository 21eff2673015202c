"""``halfbyte data`` end to end: the terminal, the page, the JSON object, the file it writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from audit_case import make_models
from command_line import halfbyte
from halfbyte.data.prepare import prepare
from halfbyte.recipe.load import load_recipe
from page_reader import read_page

BROKEN = Path(__file__).resolve().parent / "broken_data"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder, tiny_model)
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Path) -> Path:
    """A working directory with all broken data sets, each beside its models."""
    for source in BROKEN.iterdir():
        if source.is_dir():
            shutil.copytree(source, tmp_path / source.name)
            for model in models.iterdir():
                (tmp_path / source.name / model.name).symlink_to(model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_good_rows_are_shown_and_nothing_is_written(place: Path) -> None:
    before = files_in(place)
    shown = halfbyte("data", "nothing/recipe.yaml").output
    for said in (
        "rows.jsonl: 60 rows read, 60 train, 0 held out",
        "format: chat; loss on the answers alone",
        "row 1: Why do the tides rise and fall?<|im_end|>",
        "row 1: ⟦The moon draws the ocean into bulges",
        "row 21: <|im_start|>user",
        "row 41: <|im_start|>user",
        "found: nothing that could spoil a run",
        "lengths: tokens and rows",
    ):
        assert said in shown
    assert "row 42" not in shown
    assert files_in(place) == before


def test_errors_are_named_and_the_exit_code_is_1(place: Path) -> None:
    shown = halfbyte("data", "template-in-rows/recipe.yaml", "--rows", 0, code=1).output
    assert "error: template-in-rows: 60 of 60 rows already hold the marks of Alpaca" in shown
    assert "found: 1 error: a run would not begin; mend them or accept them by name" in shown
    accepted = halfbyte(
        *("data", "template-in-rows/recipe.yaml", "--rows", 0),
        *("--set", "data.accept=[template-in-rows]"),
    ).output
    assert "template-in-rows (accepted by the recipe): 60 of 60" in accepted
    assert "found: 1 accepted error" in accepted
    halfbyte("data", "doubled-end/recipe.yaml")  # warnings are no errors


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("data.path=none.jsonl", "none.jsonl"),
        ("model.name=./no-model", "no-model"),
        ("data.accept=[few-rows]", "data.accept"),
        ("data.max_length=8", "leaves no row to train"),
    ],
)
def test_what_cannot_be_read_is_one_sentence_and_2(place: Path, change: str, sentence: str) -> None:
    done = halfbyte("data", "nothing/recipe.yaml", "--set", change, code=2)
    [line] = done.stderr.strip().splitlines()[-1:]
    assert line.startswith("halfbyte: ")
    assert sentence in line
    assert line.count("\n") == 0


def test_the_object_for_programs(place: Path) -> None:
    done = halfbyte("data", "private-data/recipe.yaml", "--json", "--rows", 60)
    seen = json.loads(done.stdout)
    [finding] = seen["findings"]
    assert (finding["name"], finding["severity"], finding["stops"]) == (
        "private-data",
        "warning",
        False,
    )
    assert finding["rows"] == [8, 18, 29, 39, 52]
    assert sum(one["rows"] for one in seen["lengths"]) == seen["audit"]["rows_used"] == 60
    tokenizer = AutoTokenizer.from_pretrained(place / "private-data" / "model")
    prepared = prepare(load_recipe(Path("private-data/recipe.yaml"), here()), tokenizer, 4096)
    for row, tokens in zip(seen["rows"], prepared.train, strict=True):
        assert [piece["id"] for piece in row["pieces"]] == tokens.input_ids.tolist()
        assert [piece["learned"] for piece in row["pieces"]] == tokens.loss_mask.tolist()
        text = "".join(piece["text"] for piece in row["pieces"])
        decoded = tokenizer.decode(tokens.input_ids)
        if row["row"] in finding["rows"]:
            assert "•" in text
            assert len(text) == len(decoded)
        else:
            assert text == decoded


def here() -> list[str]:
    return ["data.path=private-data/rows.jsonl"]


PRIVATE = ("ida.holm@", "22 86 44 09", "4556 7375", "BUKB", "219-09")


def test_private_data_are_whole_in_nothing_that_is_shown_or_kept(place: Path) -> None:
    source = (place / "private-data" / "rows.jsonl").read_text(encoding="utf-8")
    assert all(part in source for part in PRIVATE)
    page = place / "page.html"
    shown = halfbyte("data", "private-data/recipe.yaml", "--rows", 60, "--html", page).output
    assert (
        "private-data: 5 of 60 rows hold what looks like private data (e-mail address: 1" in shown
    )
    told = halfbyte("data", "private-data/recipe.yaml", "--rows", 60, "--json").output
    written = page.read_text(encoding="utf-8")
    for text in (shown, told, written):
        assert "•" in text or "\\u2022" in text
        assert not [part for part in PRIVATE if part in text]


class _Tokens(HTMLParser):
    """The tokens of each row of a page: id, text, whether marked as carrying loss."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.rows: list[list[tuple[int, str, bool]]] = []
        self._open: tuple[int, bool] | None = None
        self._text = ""
        self._sign = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        classes = (given.get("class") or "").split()
        if tag == "details":
            self.rows.append([])
        elif tag == "span" and "t" in classes and "title" in given:  # the legend has none
            self._open, self._text = (int(given["title"] or ""), "loss" in classes), ""
        self._sign = tag == "i"

    def handle_endtag(self, tag: str) -> None:
        if tag == "span" and self._open is not None:
            number, loss = self._open
            self.rows[-1].append((number, self._text, loss))
            self._open = None
        self._sign = False

    def handle_data(self, data: str) -> None:
        if self._open is not None and not self._sign:
            self._text += data


def test_the_page_holds_all_it_needs_and_marks_what_is_learned(place: Path) -> None:
    page = place / "page.html"
    halfbyte("data", "nothing/recipe.yaml", "--html", page, "--rows", 60)
    text = page.read_text(encoding="utf-8")
    read = read_page(page)  # every tag closed
    assert not [tag for tag, _ in read.tags if tag in ("script", "link", "img", "iframe")]
    assert not [a for _, a in read.tags if any(k in ("src", "href") or k[:2] == "on" for k in a)]
    assert "default-src 'none'" in text
    assert "http" not in text.replace('http-equiv="', "")
    reader = _Tokens()
    reader.feed(text)
    tokenizer = AutoTokenizer.from_pretrained(place / "nothing" / "model")
    recipe = load_recipe(Path("nothing/recipe.yaml"), ["data.path=nothing/rows.jsonl"])
    prepared = prepare(recipe, tokenizer, 4096)
    assert len(reader.rows) == len(prepared.train) == 60
    for shown, row in zip(reader.rows, prepared.train, strict=True):
        assert [number for number, _, _ in shown] == row.input_ids.tolist()
        assert [loss for _, _, loss in shown] == row.loss_mask.tolist()
        assert "".join(said for _, said, _ in shown) == tokenizer.decode(row.input_ids)
    lengths = [len(row) for row in prepared.train]
    [table] = [t for t in read.tables if t[0][:2] == ["tokens", "rows"]]
    for label, rows, *_ in table[1:]:
        first, _, last = label.partition("–")
        if last:
            assert int(rows) == sum(int(first) <= n <= int(last) for n in lengths)


def test_the_page_names_each_finding_and_its_rows(place: Path) -> None:
    page = place / "page.html"
    halfbyte("data", "prompt-in-answer/recipe.yaml", "--html", page, code=1)
    text = read_page(page).text
    assert "prompt-in-answer" in text
    assert "begin with their own question" in text
    found = json.loads((BROKEN / "prompt-in-answer" / "found.json").read_text())
    rows = [str(row + 1) for row in found["prompt-in-answer"]["rows"]]
    assert f"Rows {', '.join(rows)}, …" in text
    assert "1 error" in text


def test_markup_in_rows_stays_text(place: Path) -> None:
    rows = (place / "nothing" / "rows.jsonl").read_text(encoding="utf-8")
    evil = {"instruction": "</pre><script>alert(1)</script>", "output": "\x1b[31m<b>red</b>\u202e."}
    (place / "nothing" / "rows.jsonl").write_text(json.dumps(evil) + "\n" + rows, encoding="utf-8")
    page = place / "page.html"
    shown = halfbyte("data", "nothing/recipe.yaml", "--html", page).output
    assert "\x1b" not in shown
    assert "script" not in {tag for tag, _ in read_page(page).tags}


def test_rows_that_train_are_written_once(place: Path) -> None:
    out = place / "clean.jsonl"
    said = halfbyte(
        *("data", "duplicates/recipe.yaml", "--rows", 0, "--write", out),
        *("--set", "data.cleaning=[{filter: exact_duplicates}]"),
    ).output
    assert f"60 rows to {out}" in said
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    source = (place / "duplicates" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line)["instruction"] for line in source[:60]]
    assert [row["instruction"] for row in written] == asked
    for name in ("recipe.yaml", "rows.jsonl"):
        before = (place / "nothing" / name).read_bytes()
        words = ("data", "nothing/recipe.yaml", "--write", f"nothing/{name}")
        assert "would replace what is read" in halfbyte(*words, code=2).stderr
        assert (place / "nothing" / name).read_bytes() == before


def test_neither_weights_nor_a_gpu_are_needed(place: Path) -> None:
    """In a process of its own, with the weights gone and CUDA forbidden."""
    folder = place / "weightless"
    shutil.copytree(place / "nothing" / "model", folder, ignore=shutil.ignore_patterns("*.safe*"))
    program = """
import sys, torch
def forbidden(*a, **k): raise AssertionError("asked for a device")
torch.cuda.is_available = torch.cuda.device_count = forbidden
from halfbyte.cli.app import app
app(["data", "nothing/recipe.yaml", "--set", "model.name=weightless", "--rows", "1"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "nothing that could spoil a run" in done.stdout
