"""What lm-evaluation-harness found of an adapter and its base, as it is kept beside a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.evaluate.results import FOLDER
from halfbyte.foreign_json import read_json

TASK_RESULTS = "lm_eval.json"


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one task for both models; an ``error`` is one standard error, None if not
    known."""

    task: str
    metric: str
    higher_is_better: bool | None
    base: float | None
    base_error: float | None
    adapter: float | None
    adapter_error: float | None

    @property
    def adapter_is_better(self) -> bool | None:
        """By more than two standard errors of the difference; None: it is neither better nor
        worse by as much, or nobody knows."""
        errors = (self.base_error, self.adapter_error)
        if self.base is None or self.adapter is None or None in errors:
            return None
        difference = self.adapter - self.base
        spread = sum(error**2 for error in errors if error is not None) ** 0.5
        if self.higher_is_better is None or abs(difference) <= 2 * spread:
            return None
        return (difference > 0) == self.higher_is_better

    @property
    def metric_text(self) -> str:
        """The metric, and which way is better."""
        return self.metric + {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]

    def text(self, *, adapter: bool) -> str:
        """The value of one of the models with its error."""
        value, error = (
            (self.adapter, self.adapter_error) if adapter else (self.base, self.base_error)
        )
        if value is None:
            return "–"
        figure = f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
        return figure if error is None else f"{figure} ± {error:.3f}"


@dataclass(frozen=True)
class TaskResults:
    """The figures of a run's tasks: ``rows`` of each, how they were asked, and of which adapter."""

    figures: Sequence[TaskFigure]
    rows: Mapping[str, int]
    chat: bool  # in the format that was trained
    num_fewshot: int | None
    version: str  # of the harness
    adapter_sha256: str | None


def task_figures(
    base: Mapping[str, Any], adapter: Mapping[str, Any], better: Mapping[str, Any]
) -> list[TaskFigure]:
    """The figures in the harness's results of both models, and which way is better, by task."""
    found = []
    for task, metrics in adapter.items():
        ways, others = better.get(task) or {}, base.get(task, {})
        for key in metrics:
            metric, _, of = key.partition(",")
            if metric.endswith("_stderr") or finite(metrics[key]) is None or not of:
                continue
            error = f"{metric}_stderr,{of}"
            way = ways.get(metric)
            found.append(
                TaskFigure(
                    task=task,
                    metric=metric if of == "none" else f"{metric} ({of})",
                    higher_is_better=way if isinstance(way, bool) else None,
                    base=finite(others.get(key)),
                    base_error=finite(others.get(error)),
                    adapter=finite(metrics[key]),
                    adapter_error=finite(metrics.get(error)),
                )
            )
    return found


def task_rows(counts: Mapping[str, Any]) -> dict[str, int]:
    """How many rows of each task were asked, of the harness's counts."""
    return {
        task: int(count.get("effective", 0)) if isinstance(count, Mapping) else int(count)
        for task, count in counts.items()
    }


def finite(value: Any) -> float | None:
    """``value`` as a number; None for what is none, or is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def read_task_results(run: Path) -> TaskResults | str | None:
    """The tasks' results in the folder of a ``run``; why they cannot be read; None where there are
    none.

    What a link leads to is not read.
    """
    path = run / FOLDER / TASK_RESULTS
    if path.parent.is_symlink() or path.is_symlink() or not path.exists():
        return None
    try:
        return _results_of(read_json(path))
    except (OSError, ValueError) as error:
        return f"{FOLDER}/{TASK_RESULTS} cannot be read ({error})"


def _results_of(record: Any) -> TaskResults:
    try:
        results, few = record["results"], record["num_fewshot"]
        identity = record.get("adapter_sha256")
        return TaskResults(
            figures=task_figures(results["base"], results["adapter"], record["higher_is_better"]),
            rows=task_rows(record["rows"]),
            chat=bool(record["chat_template"]),
            num_fewshot=None if few is None else int(few),
            version=str(record["versions"]["lm_eval"]),
            adapter_sha256=identity if isinstance(identity, str) else None,
        )
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"it is not of the form that halfbyte writes ({error!r})") from error
