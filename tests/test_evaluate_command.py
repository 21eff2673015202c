"""``halfbyte evaluate`` from the command line: figures, files, report, and what goes wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from command_line import halfbyte
from evaluate_case import train_run, write_lines
from halfbyte.events import read_events
from halfbyte.events.types import Evaluated
from halfbyte.report import make_report
from page_reader import read_page


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_rows: Path) -> Path:
    """A finished run that was judged once, with questions; not to be changed."""
    folder = tmp_path_factory.mktemp("evaluate")
    run = train_run(folder, tiny_model, tiny_rows)
    questions = write_lines(
        folder / "questions.jsonl",
        {"question": "Say it.", "choices": ["It is one.", "q!", "Zz"], "answer": "A"},
        {"question": "Say it again.", "choices": ["%", "That is all."], "answer": 1},
    )
    shown = halfbyte("evaluate", run, "--max-new-tokens", 12, "--choices", questions).output
    (folder / "shown.txt").write_text(shown, encoding="utf-8")
    return run


def results_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found


def rows_in(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def figure(results: dict[str, Any], key: str) -> dict[str, Any]:
    (found,) = [one for one in results["figures"] if one["key"] == key]
    return found


def test_the_losses_are_those_of_the_run(run: Path) -> None:
    measured = [r.event for r in read_events(run) if isinstance(r.event, Evaluated)]
    loss = figure(results_in(run / "evaluation"), "loss")
    of = {event.what: event for event in measured}
    assert loss["base"]["value"] == pytest.approx(of["quantized base"].loss, rel=1e-5)
    assert loss["adapter"]["value"] == pytest.approx(
        min(event.loss for event in measured if event.what == "adapter"), rel=1e-5
    )
    assert loss["adapter"]["low"] < loss["adapter"]["value"] < loss["adapter"]["high"]
    assert loss["difference"]["words"].startswith("the difference is real")
    assert loss["rows"] == 8


def test_each_rows_answers_and_scores(run: Path, tiny_rows: Path) -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import CHRF

    from halfbyte.finished import open_adapter

    opened = open_adapter(run, device="cpu")
    source = [json.loads(line) for line in tiny_rows.read_text(encoding="utf-8").splitlines()]
    rows, results = rows_in(run / "evaluation"), results_in(run / "evaluation")
    scorer, chrf = RougeScorer(["rougeL"]), CHRF()
    opened.model.config._attn_implementation = "sdpa"
    for row in rows:
        assert row["reference"] == source[row["row"]]["output"]
        asked = [source[row["row"]][name] for name in ("instruction", "input")]
        text = "\n\n".join(filter(None, asked))
        assert row["prompt"] == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        ids = opened.tokenizer(row["prompt"], return_tensors="pt").input_ids
        for who in ("base", "adapter"):
            with opened.qlora.adapter_on(who == "adapter"):
                said = opened.model.generate(ids, do_sample=False, max_new_tokens=12)
            answer = opened.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
            assert row[who]["answer"] == answer.rstrip("\ufffd")
            answer = row[who]["answer"].strip()
            if answer.isascii():
                rouge = scorer.score(row["reference"], answer)["rougeL"].fmeasure
                assert row[who]["rouge_l"] == pytest.approx(rouge)
            score = chrf.sentence_score(answer, [row["reference"]]).score
            assert row[who]["chrf"] == pytest.approx(score / 100)
    for key in ("rouge_l", "chrf", "exact_match"):
        for who in ("base", "adapter"):
            mean = sum(row[who][key] for row in rows) / len(rows)
            assert figure(results, key)[who]["value"] == pytest.approx(mean)
    (won,) = [one for one in results["wins"] if one["key"] == "loss"]
    assert won["adapter"] == sum(row["adapter"]["loss"] < row["base"]["loss"] for row in rows) == 8
    looks = results["looks"]
    lengths = [len(row["reference"].split()) for row in rows]
    assert looks["reference"]["words"] == pytest.approx(sum(lengths) / 8)
    cut = sum(not row["base"]["ended"] for row in rows)
    assert looks["base"]["unfinished"] == pytest.approx(cut / 8)


def test_what_is_shown_fits_a_terminal(run: Path) -> None:
    shown = (run.parent / "shown.txt").read_text(encoding="utf-8")
    lines = [line for line in shown.splitlines() if not line.startswith(("base ", "written"))]
    assert max(map(len, lines)) <= 80
    for words in ("answers' tokens", "ROUGE-L F1", "chrF2", "real, p = 0.008", "rows won by"):
        assert words in shown
    assert "judged by 8 held-out rows of rows.jsonl, 2 questions with choices" in shown


def test_tasks_of_an_earlier_adapter_are_called_so(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    record = {
        "adapter_sha256": "0" * 64,
        "chat_template": False,
        "num_fewshot": 2,
        "versions": {"lm_eval": "0.4"},
        "rows": {"sea": {"original": 9, "effective": 7}},
        "higher_is_better": {"sea": {"acc": True, "odd": "yes"}},
        "results": {
            "base": {"sea": {"acc,none": 0.25, "acc_stderr,none": 0.01, "alias": "sea"}},
            "adapter": {"sea": {"acc,none": 0.5, "acc_stderr,none": 0.01, "odd,none": 1.0}},
        },
    }
    (copy / "evaluation" / "lm_eval.json").write_text(json.dumps(record), encoding="utf-8")
    page = read_page(make_report(copy).html)
    (table,) = [table for table in page.tables if table[0][0] == "task"]
    assert [cell.strip() for cell in table[1]] == [
        *("sea", "acc ↑", "7", "0.250 ± 0.010", "0.500 ± 0.010", "better")
    ]
    assert [cell.strip() for cell in table[2]] == ["", "odd", "", "–", "1.000", "–"]
    assert "after 2 examples of each" in page.text
    assert "are of an earlier adapter" in page.text


def test_the_report_has_a_part_on_it(run: Path, tmp_path: Path) -> None:
    page = read_page(run / "report.html")
    assert "Judged on held-out rows" in page.headings["h3"]
    loss = figure(results_in(run / "evaluation"), "loss")
    (row,) = [
        cells
        for table in page.tables
        if table[0][0] == "answers' tokens"
        for cells in table
        if cells[0] == "loss"
    ]
    assert row[1].startswith(f"{loss['base']['value']:.3f} (")
    assert row[-1] == loss["difference"]["words"]
    assert "Judged on held-out rows" in (run / "report.md").read_text(encoding="utf-8")
    assert "of an earlier adapter" not in page.text

    # Whatever stands in the file, a report is made of it, or the reason said; nothing is obeyed.
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = copy / "evaluation" / "results.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    whole["figures"][0]["name"] = "<script>alert(1)</script>"
    whole["about"]["data"] = "a | b\n# <q>\ud800"
    whole["figures"][1]["base"]["value"] = None
    whole["figures"][2]["base"]["high"] = 1e300
    path.write_text(json.dumps(whole), encoding="utf-8")
    text = make_report(copy).html.read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "<q>" not in text
    whole["about"]["adapter_sha256"] = "0" * 64  # the run went on after it was judged
    path.write_text(json.dumps(whole), encoding="utf-8")
    assert "are of an earlier adapter of this run" in read_page(make_report(copy).html).text
    for broken in ("{", "[]", '{"format": 1}', '{"format": 9}', json.dumps(whole | {"wins": [1]})):
        path.write_text(broken, encoding="utf-8")
        assert "evaluation/results.json cannot be read" in read_page(make_report(copy).html).text
    shutil.rmtree(copy / "evaluation")
    assert "Judged on" not in read_page(make_report(copy).html).text


def test_the_same_again_and_for_a_program(run: Path, tmp_path: Path) -> None:
    done = halfbyte("evaluate", run, "--no-generate", "--json", "--out", tmp_path / "again")
    printed = json.loads(done.stdout)
    assert printed == results_in(tmp_path / "again")
    before = results_in(run / "evaluation")
    keys = [one["key"] for one in printed["figures"]]
    assert len(keys) == 6
    assert all(figure(printed, key) == figure(before, key) for key in keys)
    other = halfbyte(
        *("evaluate", run, "--no-generate", "--json", "--out", tmp_path / "other", "--seed", 1)
    )
    assert figure(json.loads(other.stdout), "loss") != figure(before, "loss")


def test_an_adapter_from_elsewhere(
    run: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "adapter", tmp_path / "peft")
    rows = write_lines(
        tmp_path / "mine.jsonl",
        *({"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(5)),
    )
    assert "name some with --data" in halfbyte("evaluate", "peft", code=2).stderr
    assert not Path("evaluation").exists()
    words = ("evaluate", "peft", "--data", rows, "--limit", 3, "--max-new-tokens", 4)
    shown = halfbyte(*words, "--base", tiny_model).output
    results = results_in(Path("evaluation"))
    assert results["about"]["rows"] == len(rows_in(Path("evaluation"))) == 3
    assert "judged by 3 rows of mine.jsonl" in shown
    assert "evaluation/results.json" in shown

    # The run's adapter on the same file gives the same figures: only where they go is another.
    halfbyte("evaluate", run, *words[2:], "--out", tmp_path / "out")
    assert results_in(tmp_path / "out")["figures"] == results["figures"]


def test_rows_that_are_hard_to_judge(run: Path, tmp_path: Path) -> None:
    """Half a character, an empty answer, one beyond what the model takes, markup."""
    rows = write_lines(
        tmp_path / "hard.jsonl",
        {"instruction": "Half \ud83d of one.", "output": "It \ud83d is."},
        {"instruction": "Nothing.", "output": ""},
        {"instruction": "Long. " * 90, "output": "Short."},
        {"instruction": "Mark [bold]up[/bold] \u001b[2J.", "output": "**x** \u001b[2J"},
        {"instruction": "Fine.", "output": "Fine."},
    )
    words = ("evaluate", run, "--data", rows, "--max-new-tokens", 3, "--out", tmp_path / "out")
    shown = halfbyte(*words).output
    found = rows_in(tmp_path / "out")
    assert [row["row"] for row in found if row["reference"] == "Fine."] == [4]
    assert 1 not in [row["row"] for row in found]
    assert "\x1b" not in shown
    assert "come out too narrow" in shown
    assert "were cut off at 3 tokens" in " ".join(shown.split())


def test_texts_have_one_loss(tiny_model: Path, tmp_path: Path) -> None:
    """Of texts all tokens are learned, and they are answered by going on with their beginning."""
    texts = [f"{'The number is one. ' * (n % 3 + 1)}It is {n}, that is all." for n in range(24)]
    rows = write_lines(tmp_path / "texts.jsonl", *({"text": text} for text in texts))
    run = train_run(tmp_path, tiny_model, rows, template="text", max_length=40, long_rows="split")
    questions = write_lines(
        tmp_path / "questions.jsonl", {"question": "It is", "choices": ["one", "Q"], "answer": 0}
    )
    halfbyte("evaluate", run, "--max-new-tokens", 4, "--choices", questions)
    results = results_in(run / "evaluation")
    groups = [one["group"] for one in results["figures"]]
    assert groups == ["all_tokens"] * 3 + ["answers"] * 3 + ["choices"] * 2
    last = [r.event for r in read_events(run) if isinstance(r.event, Evaluated)][-1]
    assert figure(results, "loss")["adapter"]["value"] == pytest.approx(last.loss, rel=1e-5)
    judged = rows_in(run / "evaluation")
    assert len(judged) == 8, "pieces of a row that was split are one row"
    assert all(row["prompt"] + row["reference"] == texts[row["row"]] for row in judged)


def test_nothing_half_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.finished import judged_files

    before = {path: path.read_bytes() for path in (run / "evaluation").iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(judged_files.os, "replace", full)
        done = halfbyte("evaluate", run, "--no-generate", code=2)
    assert "cannot be written (No space left on device)" in done.stderr
    assert {path: path.read_bytes() for path in (run / "evaluation").iterdir()} == before

    (tmp_path / "file").write_text("", encoding="utf-8")
    done = halfbyte("evaluate", run, "--out", tmp_path / "file" / "there", code=2)
    assert "name another place by --out" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--device", "tpu"], "--device tpu is none of auto, cpu and cuda"),
        (["--no-generate", "--bertscore", "x"], "--no-generate makes none"),
        (["--bertscore", "/no/bert"], "there is no model /no/bert for BERTScore"),
        (["--choices", "/no/choices.jsonl"], "there is no file /no/choices.jsonl"),
        (["--data", "/no/rows.jsonl", "--no-generate"], "there is no data file /no/rows.jsonl"),
    ],
)
def test_what_is_wrong_is_one_sentence(run: Path, words: list[str], says: str) -> None:
    done = halfbyte("evaluate", run, *words, code=2)
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
