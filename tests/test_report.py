"""The report's content, against figures worked out again from the records' own text."""

from __future__ import annotations

import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

import run_records
from halfbyte.errors import RunError
from halfbyte.events.types import Choice, Evaluated
from halfbyte.report import ReportFiles, make_report
from halfbyte.report.result import five_sentences, limits
from halfbyte.report.settings import Setting, settings
from halfbyte.report.story import read_story
from page_reader import read_page
from run_records import write_run

PICTURES = True  # are looked at here

SECTIONS = [
    "Objective",
    "Environment",
    "Model",
    "Dataset",
    "Hyperparameters",
    "Key techniques used",
    "Results",
    "Saved artifacts",
]
APPENDICES = [
    "Settings as asked and as effective",
    "Data audit",
    "Learning rate and gradient norm",
    "Speed and memory over time",
    "SHA-256 of the artifacts",
    "Parts of the run",
    "Versions",
    "Warnings and fallbacks",
    "Verdicts",
]
PAGE_ONE = [
    "The result in five sentences",
    "Held-out loss",
    "Answers before and after",
    "Time and energy",
    "What this result is not good for",
]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    """The report of a run to which nothing happened; not to be changed."""
    return make_report(write_run(tmp_path_factory.mktemp("usual") / "run"))


def lines_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Events of a kind by the json module alone."""
    text = (folder / "events.jsonl").read_text(encoding="utf-8")
    return [e for e in map(json.loads, text.splitlines()) if e["kind"] == kind]


def mean_before(folder: Path, step: int, window: int) -> float:
    """The mean loss of ``window`` steps up to ``step``; a step done twice counts as done last."""
    total, number = 0.0, 0
    for wanted in range(step - window + 1, step + 1):
        loss = None
        for line in lines_of(folder, "step"):
            if line["step"] == wanted:
                loss = line["loss"]
        if loss is not None:
            total, number = total + loss, number + 1
    return total / number


def tables(markdown: str) -> list[list[list[str]]]:
    """Every table as rows of cells, the head first, as a Markdown parser reads them."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and token.level >= 4 and found:
            found[-1][-1].append("".join(c.content for c in token.children or []))
    return found


def table(markdown: str, first_head: str, second_head: str = "") -> list[list[str]]:
    for rows in tables(markdown):
        if rows[0][0] == first_head and (not second_head or rows[0][1] == second_head):
            return rows
    raise AssertionError(f"no table with {first_head!r}")


def test_named_steps_of_a_resumed_run(tmp_path: Path) -> None:
    """Steps 61 to 70 are done twice, with other losses; 45 is no multiple of ten; 130 is beyond."""
    named = [10, 45, 65, 70, 120, 130]
    effective = run_records.EFFECTIVE.replace("loss_at_steps: auto", f"loss_at_steps: {named}")
    folder = write_run(tmp_path / "run", resume=(70, 60), effective=effective)
    files = make_report(folder)
    numbers = [line["step"] for line in lines_of(folder, "step")]
    assert len(numbers) == 130
    assert len(set(numbers)) == 120

    want = [f"{mean_before(folder, s, 10):.4f}" for s in named[:-1]] + ["not reached"]
    rows = table(files.markdown.read_text(), "step", "epoch")
    assert [row[0] for row in rows[1:]] == [str(s) for s in named]
    assert [row[2] for row in rows[1:]] == want
    page = read_page(files.html)
    assert [want] == [
        [row[2] for row in t[1:]] for t in page.tables if t[0][:2] == ["step", "epoch"]
    ]
    first_try, last_try = [e["loss"] for e in lines_of(folder, "step") if e["step"] == 65]
    assert first_try != last_try

    text = " ".join(five_sentences(read_story(folder)))
    assert "resumed once" in text
    worked = lines_of(folder, "finished")[0]["time"] - lines_of(folder, "run_started")[0]["time"]
    assert worked > 3600  # the pause between the processes is no working time
    assert read_story(folder).working_seconds < worked - 3590


def test_what_a_killed_process_did_after_its_checkpoint_is_forgotten(tmp_path: Path) -> None:
    """The first process died at 70; the second went on from 60 and has only reached 63."""
    folder = write_run(tmp_path / "run", resume=(70, 60), done=63, end="interrupted")
    story = read_story(folder)
    assert story.last_step == 63
    assert [s.step for s in story.steps] == list(range(1, 64))
    assert story.repeated_steps == 10
    assert [c.step for c in story.checkpoints] == [12, 24, 36, 48, 60, 63]


def test_parameter_table_adds_up(tmp_path: Path) -> None:
    """The counts of the TinyLlama recipe, with percentages by decimal arithmetic."""
    change = {"model": {"parameters_trainable": 4_505_600, "parameters_base": 1_100_048_384}}
    files = make_report(write_run(tmp_path, events=change))
    rows = table(files.markdown.read_text(), "parameters", "number")
    counts = [int(row[1].replace(",", "")) for row in rows[1:]]
    assert counts == [4_505_600, 1_100_048_384, 1_104_553_984]
    assert counts[0] + counts[1] == counts[2]
    shares = [Decimal(row[2].removesuffix(" %")) for row in rows[1:]]
    for number, share in zip(counts, shares, strict=True):
        assert abs(share - Decimal(number) * 100 / Decimal(counts[2])) <= Decimal("0.005")
        assert share.as_tuple().exponent == -2
    assert shares == [Decimal("0.41"), Decimal("99.59"), Decimal("100.00")]


def test_mean_of_each_epoch(usual: ReportFiles) -> None:
    sums: dict[int, list[float]] = {}
    for line in lines_of(usual.html.parent, "step"):
        epoch = sums.setdefault((line["step"] - 1) // run_records.PER_EPOCH + 1, [0.0, 0.0])
        epoch[0] += line["loss"] * line["labels"]
        epoch[1] += line["labels"]
    want = [[str(e), f"{total / labels:.4f}"] for e, (total, labels) in sums.items()]
    rows = table(usual.markdown.read_text(), "epoch", "steps")
    assert [[row[0], row[2]] for row in rows[1:]] == want


def test_sections_under_their_names_in_both_files(usual: ReportFiles) -> None:
    tokens = MarkdownIt("commonmark").parse(usual.markdown.read_text())
    heads = [
        tokens[i + 1].content
        for i, token in enumerate(tokens)
        if token.type == "heading_open" and token.tag == "h2"
    ]
    numbered = [f"{i}. {name}" for i, name in enumerate(SECTIONS, 1)]
    lettered = [f"Appendix {a}: {name}" for a, name in zip("ABCDEFGHI", APPENDICES, strict=True)]
    assert heads == [*PAGE_ONE, *numbered, *lettered]
    page = read_page(usual.html)
    marked = [f"{i} {n}" for i, n in enumerate(SECTIONS, 1)]
    marked += [f"{a} {n}" for a, n in zip("ABCDEFGHI", APPENDICES, strict=True)]
    assert page.headings["h2"] == [*PAGE_ONE, "Contents", *marked]
    assert page.headings["h1"] == ["Harbour pilot answers with SmolLM2"]


def test_page_one_says_what_the_records_say(usual: ReportFiles) -> None:
    page = read_page(usual.html)
    folder = usual.html.parent
    kept = lines_of(folder, "kept")[0]
    measured = [e for e in lines_of(folder, "evaluation") if e["what"] == "adapter"]
    best = min(measured, key=lambda e: e["loss"])
    assert kept["step"] == best["step"] != measured[-1]["step"]
    losses = next(t for t in page.tables if t[0][0] == "model" and "held-out loss" in t[0][1])
    assert [row[1] for row in losses[1:]] == ["2.7041", "3.0127", f"{best['loss']:.4f}"]
    head = page.text.split("Contents")[0]
    for prompt in [answer[1] for answer in run_records.ANSWERS]:
        assert prompt in head
    for row in run_records.ANSWERS:
        assert row[2][:100] in head  # the base's is long, and cut
        assert row[3] in head
        assert row[4] in head
    assert run_records.ANSWERS[0][2] not in head  # too long for page one
    assert run_records.ANSWERS[0][2] in page.text
    assert "1.45 Wh" in head  # 5,210 J
    assert "5.21 kJ" in head
    total = lines_of(folder, "finished")[0]["time"] - lines_of(folder, "run_started")[0]["time"]
    assert f"{int(total + 0.5) // 60} min {int(total + 0.5) % 60:02d} s" in head


def test_settings_with_their_reasons(usual: ReportFiles) -> None:
    rows = table(usual.markdown.read_text(), "setting", "asked")
    by_key = {row[0]: row[1:] for row in rows[1:]}
    assert by_key["training.optimizer"] == [
        "paged_adamw_8bit",
        "adamw_8bit",
        "paging needs a GPU; the state is kept where the adapter is",
    ]
    assert by_key["training.learning_rate"] == ["0.0002", "0.0002", "as asked"]
    assert by_key["lora.r"] == ["16", "16", "as typed on the command line"]
    assert by_key["training.weight_decay"] == ["–", "0", "default"]
    assert by_key["weights kept"][1] == "a dequantized copy"


def test_same_records_same_bytes(tmp_path: Path) -> None:
    """Again, and in another folder at another time."""
    first = make_report(write_run(tmp_path / "a" / "run"))
    before = {p: p.read_bytes() for p in (first.markdown, first.html, *first.plots)}
    assert len(first.plots) == 3
    make_report(tmp_path / "a" / "run")
    assert before == {p: p.read_bytes() for p in before}
    moved = make_report((tmp_path / "a" / "run").rename(tmp_path / "elsewhere"))
    after = [p.read_bytes() for p in (moved.markdown, moved.html, *moved.plots)]
    assert after == list(before.values())


WORSE = {"adapter_at_end": 3.4, "worse_after": None}
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    # name, what is different, what the sentences say, what they must not
    (
        "helped",
        {},
        ["so the training helped", "step 96 of 120, the lowest of the 10", "did not improve it"],
        ["not finished", "harm"],
    ),
    (
        "harm",
        WORSE,
        [
            "higher than the 2.7041",
            "did harm",
            "did not lower it from there",
            "what does not hold:",
        ],
        ["helped", "more than that cost"],
    ),
    (
        "less than 4 bits cost",
        {"adapter_at_end": 2.8, "worse_after": None},
        [
            "higher than the 2.7041",
            "the base is still the better model",
            "which does not make up for that cost",
        ],
        ["helped", "harm", "more than that cost"],
    ),
    (
        "4 bits helped and training did not",
        {"adapter_at_end": 3.05, "worse_after": None, "base": 3.2},
        ["lower than the 3.2000", "so it predicts such rows better", "training did not lower it"],
        ["helped", "harm"],
    ),
    (
        "still improving",
        {"worse_after": None},
        ["step 120 of 120, the lowest of the 10", "still improving"],
        ["did not improve"],
    ),
    (
        "no held-out rows",
        {"held_out": False},
        ["No rows were held out", "was not measured", "the last one; whether an earlier one"],
        ["helped", "harm", "lowest"],
    ),
    (
        "base not measured",
        {"base": None},
        ["lower than the 3.0127 of the base model in 4 bits", "is not known", "−1.3580"],
        ["2.7041", "more than that cost"],
    ),
    (
        "interrupted",
        {"done": 57, "end": "interrupted"},
        [
            "not finished",
            "stopped (SIGINT) after step 57 of 120",
            "the adapter's latest held-out loss",
            "No adapter has been saved yet; the lowest held-out loss so far is",
        ],
        ["The adapter that is kept"],
    ),
    (
        "diverged",
        {"done": 57, "end": "diverged", "losses": {57: float("nan")}},
        [
            "not finished",
            "stopped at step 57 of 120",
            "because the loss of step 57 is NaN on rows 4, 9, 32 and 121",
            "checkpoints/step-48 is the last good checkpoint",
        ],
        ["SIGINT", "breaks off", "The adapter that is kept"],
    ),
    (
        "cut off",
        {"done": 30, "end": "cut"},
        ["not finished", "breaks off after step 30 of 120", "No adapter has been saved yet"],
        ["SIGINT", "The adapter that is kept"],
    ),
    (
        "stopped before any evaluation",
        {"done": 5, "end": "interrupted"},
        ["after step 5 of 120", "The adapter was not measured", "none was measured on held-out"],
        ["helped", "latest held-out loss"],
    ),
    (
        "no steps",
        {"done": 0, "end": "cut"},
        ["made no training step", "No adapter was saved", "were to be trained"],
        ["helped", "memory"],
    ),
    (
        "4 bits cost nothing",
        {"base": 3.1},
        ["did not raise its loss (3.1000 before, 3.0127 after)", "training lowered it by 1.3580"],
        ["more than that cost"],
    ),
    (
        "not a number",
        {"adapter_at_end": float("nan")},
        ["is not a number, so this adapter is of no use", "chosen blindly", "what does not hold:"],
        ["helped", "the lowest of"],
    ),
]


@pytest.mark.parametrize(
    ("options", "said", "not_said"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_five_sentences_are_true(
    tmp_path: Path, options: dict[str, Any], said: list[str], not_said: list[str]
) -> None:
    sentences = five_sentences(read_story(write_run(tmp_path, **options)))
    assert len(sentences) == 5
    for sentence in sentences:
        assert sentence.endswith(".")
        assert sentence.count(". ") == 0
    text = " ".join(sentences).replace("\u00a0", " ")
    assert [part for part in said if part not in text] == []
    assert [part for part in not_said if part in text] == []


@pytest.mark.parametrize(
    "options",
    [
        {"done": 0, "end": "cut"},
        {"done": 7, "end": "interrupted", "held_out": False, "energy": None},
        {"done": 57, "end": "interrupted"},
        {"asked": None, "answers": []},
    ],
    ids=["no steps", "few steps", "interrupted", "no answers"],
)
def test_a_run_in_any_state_has_a_report(tmp_path: Path, options: dict[str, Any]) -> None:
    files = make_report(write_run(tmp_path, **options))
    page = read_page(files.html)
    story = read_story(tmp_path)
    assert page.lists[0] == [s.replace("\u00a0", " ") for s in five_sentences(story)]
    assert page.headings["h2"][6:14] == [f"{i} {name}" for i, name in enumerate(SECTIONS, 1)]
    markdown = MarkdownIt("commonmark").render(files.markdown.read_text())
    assert markdown.count("<h2>") == len(PAGE_ONE) + len(SECTIONS) + len(APPENDICES)
    drawn = [] if not story.steps else ["learning_rate.png", "loss.png", "speed.png"]
    assert sorted(path.name for path in files.plots) == drawn
    assert markdown.count("<img") == len(drawn)
    assert all((tmp_path / "plots" / name).exists() for name in drawn)


def test_one_instruction_for_all_rows_is_left_out_on_page_one(tmp_path: Path) -> None:
    """Else the prompts would be cut before anything that tells them apart."""
    instruction = "If you keep the harbour, answer by the rules. " * 5
    answers = [
        (row, f"{instruction}\n\nShip {row} asks for a berth.", "no", "yes", "yes")
        for row in (4, 9, 16)
    ]
    page = read_page(make_report(write_run(tmp_path, answers=answers)).html)
    head, rest = page.text.split("Contents", 1)
    for row in (4, 9, 16):
        assert f"Ship {row} asks for a berth." in head
        assert f"{instruction}\n\nShip {row} asks" in rest
    assert "If you keep" not in head


def test_settings_that_the_data_decided(tmp_path: Path) -> None:
    """A column that was found by its name, and a data file that lay beside the recipe."""
    recipe = run_records.EFFECTIVE.replace("    output: answer\n", "").replace(
        "path: rows/", "path: /srv/project/rows/"
    )
    found = Choice("data.columns.output", None, "answer", "the column is named so")
    folder = write_run(tmp_path, effective=recipe, extra=[found], done=0, end="cut")
    rows = {s.key: s for s in settings(read_story(folder))}
    assert rows["data.columns.output"] == Setting(
        "data.columns.output", "–", "answer", "the column is named so"
    )
    assert rows["data.path"].effective == "/srv/project/rows/harbour.jsonl"
    assert rows["data.path"].reason == "as asked, where it was found"
    assert rows["data.held_out"].reason == "as asked"


def test_limits_name_the_gravest_first(tmp_path: Path) -> None:
    helped = [t.replace("\u00a0", " ") for t in limits(read_story(write_run(tmp_path / "a")))]
    assert not any("Replacing" in text or "Medical" in text for text in helped)
    assert any("40 held-out rows" in text for text in helped)
    assert limits(read_story(write_run(tmp_path / "b", **WORSE)))[0].startswith("Replacing")
    blind = limits(read_story(write_run(tmp_path / "c", held_out=False)))
    assert blind[0].startswith("Any claim about new text")
    stopped = limits(read_story(write_run(tmp_path / "d", done=57, end="interrupted")))
    assert stopped[0].startswith("Being used as it is")
    doctor = run_records.EFFECTIVE.replace("harbour.jsonl", "chatdoctor.json")
    medical = limits(read_story(write_run(tmp_path / "e", effective=doctor)))
    assert any("in place of a doctor" in text for text in medical)


def test_evaluations_of_other_kinds_do_not_mix(tmp_path: Path) -> None:
    """A base measured after training, at a step of its own, is no adapter."""
    late = Evaluated(120, "base", 9.9, 10, 2, 0.1)
    story = read_story(write_run(tmp_path, extra=[late]))
    assert len(story.evaluations) == 10
    assert story.base is not None
    assert story.base.loss == run_records.BASE  # the later one


def test_energy_is_said_not_to_be_reported(tmp_path: Path) -> None:
    text = read_page(make_report(write_run(tmp_path, energy=None)).html).text
    assert "energynot reported" in text
    assert "kJ" not in text


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        make_report(tmp_path / "nowhere")
    with pytest.raises(RunError, match="holds no run"):
        make_report(tmp_path)
    (tmp_path / "events.jsonl").write_text("{ torn\n")
    with pytest.raises(RunError, match="no event that can be read"):
        make_report(tmp_path)
    folder = write_run(tmp_path / "run")
    (folder / "recipe.yaml").unlink()
    with pytest.raises(RunError, match="missing"):
        make_report(folder)


def test_report_needs_no_torch(tmp_path: Path) -> None:
    """Nor is matplotlib imported before there is something to draw."""
    write_run(tmp_path)
    code = (
        "import sys, pathlib, halfbyte.report as r\n"
        "assert 'matplotlib' not in sys.modules and 'jinja2' not in sys.modules\n"
        f"r.make_report(pathlib.Path({str(tmp_path)!r}))\n"
        "found = {'torch', 'transformers', 'datasets', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
