"""What rows, names and models hold reaches the terminal as signs that it shows, never obeys."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from safety_case import RECIPE, halfbyte

# A title, a colour, a cleared screen, an 8-bit control, a link, a key that is typed, a turned line.
EVIL = (
    "\x1b]0;owned\x07\x1b[31m\x1b[2J\x9b31m\x1b]8;;http://evil.example\x1b\\a\x1b]8;;\x1b\\"
    "\x1bP+q\x1b\\\u202eturned\u2066\x08\x7f\r[bold red]:smile:[/]"
)
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Path:
    """A working directory in which everything that can have a name or a text has an evil one."""
    monkeypatch.chdir(tmp_path)
    name = EVIL.replace("/", "_")[:60]
    shutil.copytree(tiny_model, tmp_path / f"model{name}")
    (tmp_path / f"model{name}" / "README.md").write_text(
        f"---\nlicense: {json.dumps(EVIL)}\n---\n", encoding="utf-8"
    )
    rows = [
        {f"ask{EVIL}": f"{EVIL} Say {n}.", f"say{EVIL}": f"{EVIL} It is {n}."} for n in range(24)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / f"rows{name}.jsonl").write_text(text, encoding="utf-8")
    recipe = RECIPE.replace("./model", json.dumps(f"./model{name}"))
    recipe = recipe.replace("rows.jsonl", json.dumps(f"rows{name}.jsonl"))
    recipe = recipe.replace("max_length: 128", "max_length: 2000")
    columns = json.dumps({"instruction": f"ask{EVIL}", "output": f"say{EVIL}"})
    recipe = recipe.replace("held_out: 4", f"held_out: 4, columns: {columns}")
    named = "".join(f"{key}: {json.dumps(EVIL)}\n" for key in ("title", "author", "objective"))
    (tmp_path / "recipe.yaml").write_text(named + recipe, encoding="utf-8")
    return tmp_path


def shown(*words: str, codes: tuple[int, ...] = (0,)) -> str:
    ended = halfbyte(*words)
    assert ended.code in codes, ended
    found = OBEYED.search(ended.out + ended.err)
    assert found is None, (words, found, (ended.out + ended.err)[:2000])
    return ended.out + ended.err


def test_no_command_lets_an_escape_through(place: Path) -> None:
    rows = next(place.glob("rows*"))
    assert "\\x1b" in shown("data", "recipe.yaml", codes=(0, 1))
    shown("data", "recipe.yaml", "--json", codes=(0, 1))
    shown("recipe", "recipe.yaml")
    shown("init", rows.name, "--out", "new.yaml")
    shown("train", "recipe.yaml", "--dry-run", "--out", "new")
    assert "\\x1b" in shown("train", "recipe.yaml", "--out", "run")
    shown("chat", "run")
    shown("report", "run")


def test_no_error_lets_an_escape_through(place: Path) -> None:
    def broken(text: str) -> str:
        (place / "bad.yaml").write_text(text, encoding="utf-8")
        return shown("data", "bad.yaml", codes=(2,))

    recipe = (place / "recipe.yaml").read_text(encoding="utf-8")
    quoted = json.dumps(EVIL)
    assert "\\x1b" in broken(recipe + f"{quoted}: 1\n")
    assert "\\x1b" in broken(recipe + f"lora: {{r: {quoted}}}\n")
    assert "\\x1b" in broken(recipe.replace("./model", "./none"))
    for row in (f'{{"a": {quoted}}}\n', f"{EVIL}\n", f'["{EVIL}"]\n', f'{{"text": {quoted}}}'):
        next(place.glob("rows*")).write_text(row, encoding="utf-8")
        shown("data", "recipe.yaml", codes=(2,))
    config = next(place.glob("model*")) / "config.json"
    config.write_text(json.dumps({"model_type": EVIL}))
    assert "\\x1b" in shown("train", "recipe.yaml", codes=(2,))
    config.write_text(json.dumps({"model_type": "llama", "hidden_size": EVIL}))
    shown("train", "recipe.yaml", codes=(2,))
