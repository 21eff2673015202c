"""``halfbyte evaluate``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.options import AdapterFolder, BaseModel, DeviceName, require_device
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from rich.console import Console

    from halfbyte.evaluate.results import Results
    from halfbyte.finished.found import FoundAdapter
    from halfbyte.finished.judging import Asked

TOLD_EVERY = 0.1  # seconds


def evaluate(
    folder: AdapterFolder = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Rows to judge by; by default those the run held out."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the first N rows.")
    ] = None,
    no_generate: Annotated[
        bool, typer.Option("--no-generate", help="Losses alone: no answers are made.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Longest answer in tokens.")
    ] = 256,
    choices: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Questions with choices as well: JSONL with question, choices and answer.",
        ),
    ] = None,
    bertscore: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="BERTScore as well, by the model of this folder or hub name."
        ),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            metavar="TASKS",
            help="In place of rows: tasks of lm-evaluation-harness, with commas between.",
        ),
    ] = None,
    lm_eval_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Tasks of your own for --lm-eval.")
    ] = None,
    lm_eval_chat: Annotated[
        bool, typer.Option("--lm-eval-chat", help="Ask tasks in the format that was trained.")
    ] = False,
    lm_eval_download: Annotated[
        bool, typer.Option("--lm-eval-download", help="Let tasks fetch their data from the hub.")
    ] = False,
    num_fewshot: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Examples before each question of a task."),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Of the resamples behind the intervals.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the results go [evaluation/ in the run]."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as one JSON object.")
    ] = False,
    base: BaseModel = None,
    device: DeviceName = "auto",
) -> None:
    """Judge an adapter against its base, on rows that did not train.

    Losses, and answers beside the references; for each figure how sure it is, and whether the
    difference may be chance. What each figure says: docs/evaluation.md.
    """
    require_device(device)
    if no_generate and bertscore is not None:
        raise HalfbyteError("--bertscore is of answers, and --no-generate makes none.")
    if lm_eval is None and (
        lm_eval_path or lm_eval_chat or lm_eval_download or num_fewshot is not None
    ):
        raise HalfbyteError("--lm-eval-… and --num-fewshot are of tasks; name some by --lm-eval.")
    if lm_eval is not None and (data or choices or bertscore):
        raise HalfbyteError(
            "--lm-eval is in place of rows; leave out --data, --choices and --bertscore."
        )
    from transformers.utils import logging

    from halfbyte.finished.found import find_adapter
    from halfbyte.finished.judged_files import judged_folder, write_judged
    from halfbyte.run.folder import latest_run

    logging.set_verbosity_error()  # its advice is for programmers
    found = find_adapter(folder or latest_run(), base)
    if lm_eval is not None:
        from halfbyte.cli.evaluate_tasks import evaluate_tasks
        from halfbyte.finished.harness import Tasks

        names = [name.strip() for name in lm_eval.split(",") if name.strip()]
        tasks = Tasks(names, lm_eval_path, num_fewshot, limit, lm_eval_chat, lm_eval_download, seed)
        evaluate_tasks(found, tasks, device=device, out=out, as_json=as_json)
        return
    place = judged_folder(found, out)
    longest = None if no_generate else max_new_tokens
    asked = replace(_asked(choices, bertscore, longest, seed), held_out=data is None)
    console = _console(as_json)
    results, rows = _judge(found, asked, data, limit, device, console)
    written = list(write_judged(place, results, rows))
    if found.run is not None and out is None:
        written += _remake_report(found.run)
    _show(results, written, console, as_json)


def _console(as_json: bool) -> Console:
    """Where it is said how far the work is: beside the JSON, on standard error."""
    from rich.console import Console

    from halfbyte.cli.display import make_console

    if not as_json:
        return make_console()
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def _asked(choices: Path | None, bertscore: str | None, longest: int | None, seed: int) -> Asked:
    """What is to be judged; what is wrong with its files is told before a model is loaded."""
    from halfbyte.finished.choices import read_questions
    from halfbyte.finished.judging import Asked

    questions = read_questions(choices) if choices is not None else []
    bert = None
    if bertscore is not None:
        from halfbyte.evaluate.bert_score import open_bert

        bert = open_bert(bertscore)
    return Asked(max_new_tokens=longest, bert=bert, questions=questions, seed=seed)


def _judge(
    found: FoundAdapter,
    asked: Asked,
    data: str | None,
    limit: int | None,
    device: str,
    console: Console,
) -> tuple[Results, list[dict[str, Any]]]:
    from halfbyte.cli.display import Display
    from halfbyte.events.types import Phase, PhaseProgress, PhaseStarted
    from halfbyte.finished.judging import judge
    from halfbyte.finished.opened import open_adapter
    from halfbyte.finished.rows import held_out_rows

    display = Display(console)

    @contextmanager
    def phase(name: str) -> Iterator[Callable[[int, int], None]]:
        began = told = time.monotonic()

        def hear(done: int, total: int) -> None:
            nonlocal told
            if time.monotonic() - told > TOLD_EVERY:
                told = time.monotonic()
                display(PhaseProgress(name, done, total))

        display(PhaseStarted(name))
        yield hear
        display(Phase(name, time.monotonic() - began))

    try:
        with phase("load"):
            opened = open_adapter(found, device=device)
        with phase("rows"):
            held_out = held_out_rows(found, opened.source, data=data, limit=limit)
        return judge(opened, held_out, asked, phase=phase)
    finally:
        display.close()


def _remake_report(run: Path) -> list[Path]:
    from halfbyte.report import make_report

    return [make_report(run).html]


def _show(results: Results, written: Sequence[Path], console: Console, as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps(results.as_json(), indent=1))
        return
    from halfbyte.cli.evaluate_table import print_results

    print_results(console, results, written)
