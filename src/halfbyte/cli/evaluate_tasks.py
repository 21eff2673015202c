"""``halfbyte evaluate --lm-eval``: base and adapter on tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from halfbyte.cli.units import visible
from halfbyte.evaluate.results import FOLDER
from halfbyte.evaluate.task_results import TASK_RESULTS
from halfbyte.finished.harness import HarnessResults, Tasks, prepare_tasks, run_tasks
from halfbyte.finished.judged_files import judged_folder
from halfbyte.finished.opened import open_adapter
from halfbyte.report import make_report
from halfbyte.report.make import write_whole

if TYPE_CHECKING:
    from halfbyte.finished.found import FoundAdapter
    from halfbyte.finished.harness_tasks import Fetched


def evaluate_tasks(
    found: FoundAdapter, tasks: Tasks, *, device: str, out: Path | None, as_json: bool
) -> None:
    """Ask both models, write ``lm_eval.json`` and show its figures; of a run in its report too."""
    console = Console(stderr=as_json, highlight=False, markup=False, emoji=False)
    with console.status("reading the tasks …") if console.is_terminal else nullcontext():
        manager, wanted = prepare_tasks(tasks)
    if wanted and tasks.download:
        console.print("These data sets are fetched from the hub, if they are not here already:")
        for what in dict.fromkeys(one.what for one in wanted):
            console.print(Text(f"  {visible(what)}"), soft_wrap=True)
    folder = judged_folder(found, out)
    results = _run(found, tasks, manager, wanted, device, console)
    path = folder / TASK_RESULTS
    text = json.dumps(results.record, indent=1) + "\n"
    write_whole(path, text.encode())
    written = [path]
    if found.run is not None and folder == found.run / FOLDER:
        written.append(make_report(found.run).html)
    for name in results.ignored:
        print(
            f"halfbyte: a task sets {visible(name)}, which has no counterpart here and was left "
            "out.",
            file=sys.stderr,
        )
    if as_json:
        sys.stdout.write(text)
    else:
        _print(console, results, tasks, written)


def _run(
    found: FoundAdapter,
    tasks: Tasks,
    manager: Any,
    wanted: list[Fetched],
    device: str,
    console: Console,
) -> HarnessResults:
    if not console.is_terminal:
        return run_tasks(open_adapter(found, device=device), tasks, manager, wanted)
    with console.status("loading the model …") as status:
        opened = open_adapter(found, device=device)
        status.update("building the requests …")

        def hear(model: str, done: int, of: int) -> None:
            status.update(f"{model}: {done:,} of {of:,} requests …")

        return run_tasks(opened, tasks, manager, wanted, on_progress=hear)


def _print(
    console: Console, results: HarnessResults, tasks: Tasks, written: Sequence[Path]
) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("base", justify="right", no_wrap=True)
    table.add_column("adapter", justify="right", no_wrap=True)
    last = None
    for figure in results.figures:
        rows = results.rows.get(figure.task)
        table.add_row(
            "" if figure.task == last else visible(figure.task),
            visible(figure.metric_text),
            "" if rows is None or figure.task == last else f"{rows:,}",
            figure.text(adapter=False),
            Text(
                figure.text(adapter=True),
                {True: "green", False: "red", None: ""}[figure.adapter_is_better],
            ),
        )
        last = figure.task
    console.print(table)
    console.print()
    how = "in the format that was trained" if tasks.chat else "as plain text"
    console.print(
        f"Asked {how}. ±: one standard error. ↑: higher is better, ↓: lower is.", style="dim"
    )
    console.print(
        "In colour: the adapter is better, or worse, by more than two standard errors.",
        style="dim",
    )
    for path in written:
        console.print(Text.assemble(("written   ", "bold"), visible(str(path))), soft_wrap=True)
