"""Cleaning among the other stages, and from the command line to the report."""

from __future__ import annotations

import io
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer
from typer.testing import CliRunner

from cleaning_case import SENTENCES, conversation, filters, row
from halfbyte.cli.app import app
from halfbyte.cli.display import Display
from halfbyte.data.cleaning import clean, write_cleaned
from halfbyte.data.example import Example, Message
from halfbyte.data.example_store import ExampleStore
from halfbyte.data.prepare import Prepared, prepare
from halfbyte.data.split import read_split
from halfbyte.errors import DataError
from halfbyte.events import EventLog, read_events
from halfbyte.events.types import Filtered, Funnel, RowShown
from halfbyte.recipe import Recipe
from halfbyte.recipe.data_schema import DataRecipe
from halfbyte.report.make import make_report

LEAST = {"filter": "length", "answer_min_words": 3}
OVERLAP = {"filter": "overlap_with_held_out"}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def asked(number: int, answer: str | None = None, question: str | None = None) -> dict[str, str]:
    return {
        "instruction": question or f"Say {number}.",
        "input": "",
        "output": f"It is {number}." if answer is None else answer,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def prepared(tokenizer: Any, folder: Path, rows: list[dict[str, Any]], **data: Any) -> Prepared:
    path = write(folder / "rows.jsonl", rows)
    recipe = Recipe.model_validate({"model": {"name": "tiny"}, "data": {"path": path, **data}})
    return prepare(recipe, tokenizer, 256)


def numbers(rows: Any) -> list[int]:
    return [one.row for one in rows]


# Among the other stages.


def test_rows_keep_their_numbers_and_the_audit_adds_up(tokenizer: Any, tmp_path: Path) -> None:
    rows = [asked(n) for n in range(60)]
    short, copied, empty = [3, 17, 59], [8, 30], 40
    for n in short:
        rows[n]["output"] = "No."
    for n in copied:
        rows[n] = dict(rows[5])
    rows[empty]["output"] = ""
    filters = [{"filter": "exact_duplicates", "by": "question"}, LEAST]
    found = prepared(tokenizer, tmp_path, rows, held_out=6, cleaning=filters)
    gone = {*short, *copied, empty}
    assert sorted(numbers(found.train) + numbers(found.held_out)) == sorted(set(range(60)) - gone)
    assert numbers(found.train_rows) == numbers(found.train)
    assert numbers(found.held_out_rows) == numbers(found.held_out)
    assert found.funnel is not None
    assert [(f.rows_in, f.dropped) for f in found.funnel.filters] == [(60, 2), (58, 4)]
    audit = found.audit
    assert audit.rows_dropped == {"cleaning": 6}
    assert audit.rows_read == 60 == audit.rows_used + audit.rows_held_out + 6
    assert prepared(tokenizer, tmp_path, rows).funnel is None


def test_held_out_rows_are_drawn_from_clean_ones_and_their_copies_do_not_train(
    tokenizer: Any, tmp_path: Path
) -> None:
    rows = [asked(n, question=f"Say {n % 20}.") for n in range(60)]  # each is asked three times
    found = prepared(tokenizer, tmp_path, rows, held_out=5, cleaning=[OVERLAP, LEAST])
    questions = {n % 20 for n in numbers(found.held_out)}
    assert numbers(found.train) == [n for n in range(60) if n % 20 not in questions]
    assert found.funnel is not None
    assert [f.name for f in found.funnel.filters] == ["length", "overlap_with_held_out"]
    overlap = found.funnel.filters[1]
    assert overlap.rows_in == 55
    assert overlap.dropped == 55 - len(found.train)
    assert found.audit.rows_dropped == {"cleaning": overlap.dropped}
    assert found.audit.rows_read == 60
    alone = prepared(tokenizer, tmp_path, rows, held_out=5, cleaning=[LEAST])
    assert numbers(alone.held_out) == numbers(found.held_out)
    same = [asked(n, question="Say it.") for n in range(8)]
    with pytest.raises(DataError, match="overlap_with_held_out finds each of them"):
        prepared(tokenizer, tmp_path, same, held_out=2, cleaning=[OVERLAP])


def test_rows_held_out_after_the_limit_are_cleaned_and_those_of_a_file_are_not(
    tokenizer: Any, tmp_path: Path
) -> None:
    rows = [asked(n, "No." if n % 2 else None) for n in range(400)]
    after = {"limit": 100, "held_out_from": "after", "held_out": 20}
    found = prepared(tokenizer, tmp_path, rows, cleaning=[LEAST], **after)
    assert numbers(found.train) == list(range(0, 100, 2))
    assert numbers(found.held_out) == list(range(100, 140, 2))
    other = write(tmp_path / "other.jsonl", rows[:30])
    found = prepared(tokenizer, tmp_path, rows, cleaning=[LEAST], held_out_path=other)
    assert numbers(found.held_out) == list(range(30))
    assert numbers(found.train) == list(range(0, 400, 2))
    both = [LEAST, OVERLAP]
    found = prepared(tokenizer, tmp_path, rows, cleaning=both, held_out_path=other)
    assert numbers(found.train) == list(range(30, 400, 2))


@pytest.mark.parametrize("source", ["random", "after", "file"])
def test_the_effective_recipe_gives_the_same_rows(
    tokenizer: Any, tmp_path: Path, source: str
) -> None:
    rows = [asked(n, "No." if n % 3 == 0 else None, f"Say {n % 70}.") for n in range(200)]
    data: dict[str, Any] = {"cleaning": [LEAST, OVERLAP]}
    if source == "file":
        data["held_out_path"] = write(tmp_path / "other.jsonl", rows[:40])
    else:
        data |= {"held_out_from": source, "limit": 120 if source == "after" else None}
    first = prepared(tokenizer, tmp_path, rows, **data)
    assert first.held_out
    stated = {"held_out": len(first.held_out), "max_length": first.max_length, "template": "chat"}
    again = prepared(tokenizer, tmp_path, rows, **data, **stated)
    assert numbers(first.train) == numbers(again.train)
    assert numbers(first.held_out) == numbers(again.held_out)


def test_where_all_rows_go_the_error_names_the_filter(tokenizer: Any, tmp_path: Path) -> None:
    rows = [asked(n, "No.") for n in range(30)]
    wanted = r"data\.cleaning drops them, most by the filter length \(30 of 30 rows\)"
    for held_out in ({}, {"held_out_path": write(tmp_path / "other.jsonl", rows)}):
        with pytest.raises(DataError, match=wanted):
            prepared(tokenizer, tmp_path, rows, cleaning=[LEAST], **held_out)


def test_sources_are_cleaned_before_they_are_mixed(tokenizer: Any, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [asked(n, "No." if n < 10 else None) for n in range(20)])
    second = write(tmp_path / "b.jsonl", [asked(n) for n in range(12)])
    sources = [{"path": first, "rows": 10, "repeat": 2}, {"path": second}]
    kept = {"filter": "exact_duplicates"}
    recipe = Recipe.model_validate(
        {
            "model": {"name": "tiny"},
            "data": {"sources": sources, "held_out": 0, "cleaning": [LEAST, kept]},
        }
    )
    found = prepare(recipe, tokenizer, 256)
    from_first = [one.row for one in found.train_rows if one.source == 0]
    assert sorted(from_first) == list(range(10, 20))
    # Rows 10 and 11 of the second are copies of those of the first.
    assert [one.row for one in found.train_rows if one.source == 1] == list(range(10))
    assert found.funnel is not None
    assert found.funnel.filters[1].examples[0].source == 1
    assert "of source 1" in found.funnel.filters[1].examples[0].text


def test_rows_in_a_file_are_cleaned_as_those_in_memory() -> None:
    pytest.importorskip("datasketch")
    texts = [text.replace(".", f" {n}.") for n in range(3) for text in SENTENCES.values()]
    examples = [row(f"What {n}?", text, n) for n, text in enumerate([*texts, *texts[:9]])]
    chosen = filters(
        {"filter": "pattern", "replace": "[aeiou]", "replacement": "o"},
        {"filter": "near_duplicates", "by": "answer"},
        {"filter": "pattern", "field": "question", "replace": "What", "replacement": "Who"},
        {"filter": "script", "allow": ["Latin"], "field": "answer"},
    )
    memory, stored = clean(chosen, examples), clean(chosen, ExampleStore(examples, kept=4))
    assert list(stored.examples) == list(memory.examples)
    assert stored.funnel == memory.funnel
    assert 0 < len(stored.examples) < len(texts)
    assert stored.examples[-1].instruction.startswith("Who")
    assert stored.examples[1:3][0] == memory.examples[1]


# Written out.


def test_written_rows_read_back_the_same(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
    call = {"name": "clock", "arguments": {"zone": "UTC"}}
    kinds: list[list[Example]] = [
        [Example.question_and_answer(n, f"Say {n}.", "Now." * (n % 2), "é") for n in range(4)],
        [
            conversation("Hi.", "Hello.", "Who?", "Nobody, \ud83d.", number=0),
            Example(
                1,
                (
                    Message("system", "Be brief."),
                    Message("user", "What time is it?"),
                    Message("assistant", "", reasoning="A clock tells.", tool_calls=(call,)),
                    Message("tool", "noon", name="clock"),
                    Message("assistant", "Noon.", learn=True),
                ),
                tools=(tool,),
            ),
            Example(2, (Message("user", "x"), Message("assistant", "y", learn=False))),
        ],
        [Example(n, text=f"Text {n}.\n\nMore.") for n in range(3)],
    ]
    for examples in kinds:
        path = tmp_path / "clean" / "rows.jsonl"
        assert write_cleaned(path, examples) == len(examples)
        assert read_split(DataRecipe(path=str(path), held_out=0)).rows == examples
        assert list(path.parent.iterdir()) == [path]
    (tmp_path / "taken").mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        write_cleaned(tmp_path / "taken", kinds[0])


# Shown.

FUNNEL = Funnel(
    1200,
    1000,
    [
        Filtered("exact_duplicates", "by question", 1200, 196, 0, [RowShown(17, "as row 3: x")]),
        Filtered("pattern", "", 1004, 4, 30, [RowShown(9, "a [\x1b[31m]|b*", 2)]),
    ],
)


def test_the_funnel_is_read_back_from_the_record(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        log(FUNNEL)
    [record] = read_events(tmp_path)
    assert record.event == FUNNEL
    line = json.loads((tmp_path / "events.jsonl").read_text())
    line["filters"][0]["later"] = line["filters"][0]["examples"][0]["later"] = 1
    (tmp_path / "events.jsonl").write_text(json.dumps(line))
    assert [r.event for r in read_events(tmp_path)] == [FUNNEL]


@pytest.mark.parametrize("live", [True, False])
def test_the_terminal_shows_the_funnel(live: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=live, width=90, highlight=False, markup=False)
    display = Display(console)
    display(FUNNEL)
    display.close()
    text = out.getvalue()
    for said in (
        "1,200 rows in, 1,000 left (83.3%)",
        "196 dropped, 1,004 left  exact_duplicates (by question)",
        "row 18: as row 3: x",
        "4 dropped, 1,000 left  pattern: 30 changed",
        "row 10 of source 3: a [\\x1b[31m]|b*",
    ):
        assert said in text
    assert "\x1b[31m" not in text


def test_from_the_command_line_to_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    rows = [asked(n) for n in range(40)]
    rows[7]["output"], rows[20], rows[30]["output"] = "No.", dict(rows[2]), "Write to a@byron.net"
    write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "model").symlink_to(tiny_model)
    (tmp_path / "r.yaml").write_text(
        "model: {name: ./model}\n"
        "data:\n  path: rows.jsonl\n  held_out: 4\n  max_length: 128\n  cleaning:\n"
        "    - filter: exact_duplicates\n      by: question\n"
        "    - filter: length\n      answer_min_words: 3\n"
        "    - filter: pattern\n      drop: '@'\n"
        "    - filter: overlap_with_held_out\n"
        "training: {batch_size: 4, gradient_accumulation: 1, max_steps: 2}\n"
        "evaluation: {prompts: 0}\n"
    )
    monkeypatch.chdir(tmp_path)

    def halfbyte(*words: str) -> str:
        result = CliRunner().invoke(app, words)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    shown = halfbyte("train", "r.yaml", "--out", "run")
    assert "cleaning: 40 rows in, 37 left (92.5%)" in shown
    assert "cleaning:   row 8: answer of 1 word: No." in shown
    assert "rows.jsonl: 40 rows read, 33 train, 4 held out" in shown
    assert "byron" not in shown
    [funnel] = [r.event for r in read_events(Path("run")) if isinstance(r.event, Funnel)]
    assert [(f.name, f.dropped) for f in funnel.filters] == [
        ("exact_duplicates", 1),
        ("length", 1),
        ("pattern", 1),
        ("overlap_with_held_out", 0),
    ]
    effective, asked_for = Recipe.load("run/recipe.yaml"), Recipe.load("r.yaml")
    assert effective.data.cleaning == asked_for.data.cleaning
    report = Path("run/report.md").read_text()
    assert "| `exact_duplicates` | by question | 40 | 1 | 2.50 % | 0 |" in report
    assert "| 37 rows left |" in report
    assert "answer of 1 word: No" in report
    assert "byron" not in report
    [said] = [line for line in report.splitlines() if line.startswith("| `data.cleaning` |")]
    assert said.endswith("| as asked |")
    page = Path("run/report.html").read_text()
    assert "answer of 1 word: No." in page
    # A record without the event, as one of an earlier version, gives a report without the table.
    events = Path("run/events.jsonl")
    lines = [line for line in events.read_text().splitlines() if '"cleaning"' not in line[:30]]
    events.write_text("\n".join(lines) + "\n")
    make_report(Path("run"))
    assert "rows left" not in Path("run/report.md").read_text()
    # The filters are told with the other settings, and are set on the command line.
    told = halfbyte("recipe", "r.yaml", "--set", "data.cleaning=[{filter: unfinished}]")
    assert "data.cleaning = unfinished  (as the recipe says)" in told
    assert halfbyte("recipe", "r.yaml").count("length (answer_min_words 3)") == 1


def test_a_run_goes_on_with_the_same_filters_and_no_others(tokenizer: Any, tmp_path: Path) -> None:
    from halfbyte.errors import RunError
    from halfbyte.run.changes import changed_recipe

    path = write(tmp_path / "rows.jsonl", [asked(n) for n in range(8)])

    def of(*cleaning: dict[str, Any]) -> Recipe:
        data = {"path": path, "cleaning": list(cleaning)}
        return Recipe.model_validate({"model": {"name": "m"}, "data": data})

    assert changed_recipe(tmp_path, of(LEAST), of(dict(LEAST)), ()) == (of(LEAST), [])
    ways = [of(), of(LEAST), of(OVERLAP), of(LEAST, OVERLAP), of(OVERLAP, LEAST)]
    for one, other in combinations(ways, 2):
        with pytest.raises(RunError, match=r"another recipe \(data.cleaning .*cannot change"):
            changed_recipe(tmp_path, one, other, ())
