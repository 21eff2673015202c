"""A blind trial: whose answer it is stays secret, no choice is lost, and the test is exact."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from halfbyte.cli.app import app
from halfbyte.cli.blind import judge, summary
from halfbyte.finished.blind import FILE, Pair, Score, Tally, pairs_of, scores, sign_test
from halfbyte.report.side_by_side import Asked, Column, Said, SideBySide
from talk_case import make_run

ONE, OTHER = Column("base", "", "identity b"), Column("adapter", "", "identity a")


def seen(prompts: int, columns: tuple[Column, ...] = (ONE, OTHER)) -> SideBySide:
    asked = [
        Asked(
            f"row {n}",
            f"Question {n}?",
            None,
            [Said(f"{column.name} on {n}", 3, True, 0.1, "p") for column in columns],
        )
        for n in range(prompts)
    ]
    return SideBySide(columns, asked, "rows", 0, 3, 0.0, "1")


def test_the_sign_test_is_that_of_all_outcomes() -> None:
    for n in range(11):
        outcomes = [sum(signs) for signs in itertools.product((0, 1), repeat=n)]
        for wins in range(n + 1):
            as_far = [k for k in outcomes if abs(2 * k - n) >= abs(2 * wins - n)]
            assert sign_test(wins, n - wins) == float(Fraction(len(as_far), 2**n))


def test_the_sign_test_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for wins, losses in ((0, 1), (15, 4), (40, 60), (0, 0), (300, 251), (2000, 1)):
        theirs = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert sign_test(wins, losses) == pytest.approx(theirs, rel=1e-9, abs=1e-300)


def test_sides_and_order_are_drawn_and_tell_nothing() -> None:
    pairs, same = pairs_of(seen(400), seed=3)
    assert same == 0
    assert pairs == pairs_of(seen(400), seed=3)[0]
    left = sum(pair.left == "base" for pair in pairs)
    assert 150 < left < 250
    runs = sum(a.left != b.left for a, b in itertools.pairwise(pairs))
    assert 150 < runs < 250, "sides do not come in blocks"
    assert [pair.title for pair in pairs] != [f"row {n}" for n in range(400)]
    for pair in pairs:
        assert pair.left_text.startswith(pair.left)
        assert pair.right_text.startswith(pair.right)
    # Whichever column stands first, and however many prompts there are, a pair is drawn the same.
    turned = {p.key: p for p in pairs_of(seen(30, (OTHER, ONE)), seed=3)[0]}
    assert all(turned[p.key] == p for p in pairs if p.key in turned)
    assert len(turned) == 30
    other = {p.key: p.left for p in pairs_of(seen(400), seed=4)[0]}
    assert 100 < sum(other[p.key] != p.left for p in pairs) < 300


def test_a_question_that_comes_twice_is_asked_once() -> None:
    once = seen(3)
    twice = SideBySide([ONE, OTHER], [*once.asked, *once.asked], "rows", 0, 3, 0.0, "1")
    assert pairs_of(twice, seed=0) == pairs_of(once, seed=0)


def test_the_same_answer_twice_is_not_asked() -> None:
    alike = [Said("same", 1, True, 0.1, "p"), Said(" same\n", 1, True, 0.1, "q")]
    record = SideBySide([ONE, OTHER], [Asked("row", "Q", None, alike)], "r", 0, 3, 0.0, "1")
    assert pairs_of(record, seed=0) == ([], 1)


def typed(*lines: str | type[BaseException]) -> Callable[[str], str]:
    waiting = [*lines, EOFError]

    def read(_: str) -> str:
        line = waiting.pop(0)
        if isinstance(line, str):
            return line
        raise line

    return read


def tried(tally: Tally, pairs: list[Pair], *lines: str | type[BaseException]) -> tuple[bool, str]:
    shown = io.StringIO()
    console = Console(file=shown, width=78, highlight=False, markup=False)
    whole = judge(pairs, tally, console, seed=0, read=typed(*lines))
    return whole, shown.getvalue()


def test_every_choice_is_on_the_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "evaluation" / FILE
    pairs, _ = pairs_of(seen(6), seed=0)
    lines: list[Any] = ["l", "what", "R", " tie ", KeyboardInterrupt]

    def read(_: str) -> str:
        kept = path.read_text().count("\n") if path.exists() else 0
        assert kept == [0, 1, 1, 2, 3][5 - len(lines)]
        line = lines.pop(0)
        if isinstance(line, str):
            return line
        raise line

    shown = io.StringIO()
    assert not judge(pairs, Tally(path), Console(file=shown), seed=0, read=read)
    tally = Tally(path)
    assert [choice.chosen for choice in tally.choices] == ["left", "right", "tie"]
    assert [choice.pair for choice in tally.choices] == [pair.key for pair in pairs[:3]]
    # Going on asks none of them again.
    left = [pair for pair in pairs if pair.key not in tally.asked()]
    whole, _ = tried(tally, left, "s", "q")
    assert whole
    assert tally.asked() == {pair.key for pair in pairs[:4]}
    (score,) = scores(Tally(path).choices, [ONE, OTHER])
    chosen = [pairs[0].left, pairs[1].right]
    assert (score.one, score.other) == ("adapter", "base")
    assert (score.wins, score.losses) == (chosen.count("adapter"), chosen.count("base"))
    assert (score.ties, score.skipped) == (1, 1)
    assert scores(tally.choices, [ONE, Column("adapter", "", "another")]) == []


def test_a_line_that_was_cut_off_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / FILE
    pairs, _ = pairs_of(seen(3), seed=0)
    tried(Tally(path), pairs, "l", "r", "q")
    whole = path.read_text()
    path.write_text(whole[:-20])
    tally = Tally(path)
    assert (len(tally.choices), tally.unreadable) == (1, 1)
    tried(tally, pairs[2:], "t")
    again = Tally(path)
    assert [choice.chosen for choice in again.choices] == ["left", "tie"]
    assert again.unreadable == 1


def test_whose_answer_it_is_stays_secret() -> None:
    pairs, _ = pairs_of(seen(4), seed=0)
    plain = [
        Pair(
            p.key, p.title, p.question, p.left, p.right, "x", "y", "said this", "said \x1b[2J that"
        )
        for p in pairs
    ]
    tally = Tally(Path("/nonexistent/blind.jsonl"))
    _, shown = tried(tally, plain, "q")
    assert "base" not in shown
    assert "adapter" not in shown
    assert "\x1b" not in shown


def test_what_is_said_of_the_result() -> None:
    real = " ".join(summary([Score("adapter", "base", 15, 3, 2, 1)]))
    assert "adapter was better 15 times, base 3 times (2 tied, 1 skipped)." in real
    assert "adapter is better, beyond what chance explains" in real
    assert "p = 0.008" in real
    assert "base is better" in " ".join(summary([Score("adapter", "base", 3, 15, 0, 0)]))
    assert "may be chance" in " ".join(summary([Score("adapter", "base", 3, 1, 0, 0)]))
    assert "nothing to test" in " ".join(summary([Score("adapter", "base", 0, 0, 3, 0)]))
    assert "p < 0.001" in " ".join(summary([Score("adapter", "base", 40, 1, 0, 0)]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("blind") / "run", tiny_model, "chat")


def test_a_trial_in_a_pipe_goes_on_where_it_stopped(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One\n\nTwo\n\nThree\n\nFour\n")
    words = ["compare", str(copy), "--blind", "--prompts", str(prompts), "--device", "cpu"]
    words += ["--max-new-tokens", "8"]

    def trial(keys: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, words, input=keys)
        assert done.exit_code == code, done.output
        return done.stdout

    first = trial("l\nr\n")
    assert "1 of 4" in first
    assert "adapter was better" in first
    assert first.index("base") > first.index("3 of 4"), "no name before the summary"
    second = trial("t\nq\n")
    assert "1 of 2" in second
    assert "1 of 1" in trial("s\n")
    assert "Every pair has been judged." in trial("l\n")
    path = copy / "evaluation" / FILE
    choices = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({choice["pair"] for choice in choices}) == len(choices) == 4
    assert {choice["question"] for choice in choices} == {"One", "Two", "Three", "Four"}
    assert not (copy / "evaluation" / "side_by_side.json").exists(), "which would tell"
