"""An adapter and its base on tasks of lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import halfbyte
from halfbyte.data.text_file import sha256_of
from halfbyte.errors import DataError, HalfbyteError
from halfbyte.evaluate.task_results import TaskFigure, finite, task_figures, task_rows
from halfbyte.finished.found import FoundAdapter, require_template
from halfbyte.finished.harness_model import make_language_model
from halfbyte.finished.harness_tasks import (
    Fetched,
    fetched,
    guarded,
    require_harness,
    require_tasks,
    task_manager,
)
from halfbyte.finished.opened import OpenedAdapter
from halfbyte.finished.variants import BASE, FINAL, use_variant
from halfbyte.model.adapter_files import WEIGHTS


@dataclass(frozen=True)
class Tasks:
    """Which tasks are asked, and how.

    ``names`` are those of tasks, groups or tags; ``folder`` holds tasks of the user's own. ``chat``
    asks them in the format that was trained. ``limit`` is of rows a task.
    """

    names: Sequence[str]
    folder: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    chat: bool = False
    download: bool = False
    seed: int = 0


@dataclass(frozen=True)
class HarnessResults:
    """Figures of both models, and everything that they depend on, as it is written as JSON."""

    figures: Sequence[TaskFigure]
    rows: Mapping[str, int]  # of each task
    record: dict[str, Any]
    ignored: Sequence[str]  # settings of tasks that have no counterpart here


def prepare_tasks(tasks: Tasks) -> tuple[Any, list[Fetched]]:
    """The harness's manager of tasks, and the data sets that these would fetch.

    Raises ModelError where the harness is not installed, DataError for a task that there is not,
    for a folder that would run code, and where a file is to be fetched and ``download`` is off.
    """
    require_harness()
    if not tasks.names:
        raise DataError("--lm-eval names no task.")
    with _quiet():
        manager = task_manager(tasks.folder, tasks.names)
    require_tasks(manager, tasks.names)
    wanted = fetched(manager, tasks.names)
    far = [one for one in wanted if "://" in one.what]
    if far and not tasks.download:
        raise DataError(
            f"the task {far[0].task} fetches {far[0].what}; --lm-eval-download allows it."
        )
    return manager, wanted


def run_tasks(
    opened: OpenedAdapter,
    tasks: Tasks,
    manager: Any,
    wanted: Sequence[Fetched],
    *,
    on_progress: Callable[[str, int, int], None] = lambda model, done, of: None,
) -> HarnessResults:
    """Base and adapter on ``tasks``; ``on_progress`` hears whose requests are done, of how many.

    Raises DataError where a task cannot be read, or needs what is not here and must not be fetched.
    """
    if tasks.chat:
        require_template(opened.found, opened.tokenizer)
    ignored: list[str] = []
    results = {}
    for name in (BASE, FINAL):
        model = make_language_model(
            opened,
            seed=tasks.seed,
            on_progress=lambda done, of, name=name: on_progress(name, done, of),  # type: ignore[misc]
            on_ignored=ignored.append,
        )
        with use_variant(opened, name):
            results[name] = _evaluate(model, tasks, manager, wanted)
    return HarnessResults(
        figures=task_figures(
            results[BASE].get("results", {}),
            results[FINAL].get("results", {}),
            results[FINAL].get("higher_is_better", {}),
        ),
        rows=task_rows(results[FINAL].get("n-samples", {})),
        record=_record(opened.found, tasks, results),
        ignored=sorted(set(ignored)),
    )


def _evaluate(model: Any, tasks: Tasks, manager: Any, wanted: Sequence[Fetched]) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    try:
        with _quiet(), guarded(download=tasks.download):
            found = simple_evaluate(
                model=model,
                tasks=list(tasks.names),
                task_manager=manager,
                num_fewshot=tasks.num_fewshot,
                limit=tasks.limit,
                apply_chat_template=tasks.chat,
                log_samples=False,
                bootstrap_iters=1000,
                random_seed=tasks.seed,
                numpy_random_seed=tasks.seed,
                torch_random_seed=tasks.seed,
                fewshot_random_seed=tasks.seed,
            )
    except (HalfbyteError, MemoryError):
        raise
    except Exception as error:  # whatever a task's file or its data make the harness raise
        raise DataError(_why(error, tasks, wanted)) from error
    return dict(found or {})


def _why(error: Exception, tasks: Tasks, wanted: Sequence[Fetched]) -> str:
    said = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    if wanted and not tasks.download and _is_absence(error):
        first = wanted[0]
        return (
            f"the task {first.task} reads the data set {first.what} of the hub, which is not on "
            "this machine; --lm-eval-download fetches it."
        )
    names = ", ".join(tasks.names)
    return f"lm-evaluation-harness could not do {names} ({type(error).__name__}: {said})."


def _is_absence(error: BaseException | None) -> bool:
    """Whether something could not be had because nothing may be fetched, or no network answers."""
    while error is not None:
        name = type(error).__name__
        if isinstance(error, ConnectionError | FileNotFoundError) or "Offline" in name:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _quiet() -> Any:
    """The harness's log and bars are for programmers."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


def _record(
    found: FoundAdapter, tasks: Tasks, results: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What is written: plain values alone."""
    last = results[FINAL]
    return {
        "tasks": list(tasks.names),
        "base_model": found.base.name,
        "adapter_sha256": sha256_of(found.adapter / WEIGHTS),
        "num_fewshot": tasks.num_fewshot,
        "limit": tasks.limit,
        "chat_template": tasks.chat,
        "seed": tasks.seed,
        "made": time.time(),
        "versions": {
            "halfbyte": halfbyte.__version__,
            "lm_eval": version("lm_eval"),
            "tasks": _plain(last.get("versions", {})),
        },
        "rows": _plain(last.get("n-samples", {})),
        "higher_is_better": _plain(last.get("higher_is_better", {})),
        "results": {name: _plain(found.get("results", {})) for name, found in results.items()},
    }


def _plain(value: Any) -> Any:
    """``value`` as JSON has it; what is no value (a function, an array) by its name."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | str):
        return value
    number = finite(value)
    if number is None:
        return str(value)
    return value if isinstance(value, int) else number
