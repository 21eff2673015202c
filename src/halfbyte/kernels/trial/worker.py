"""A process that tries kernels: ``python -m halfbyte.kernels.trial.worker SPEC [TASK ...]``.

Beside the spec's file lies what several such processes share: a task is taken by making
``TASK.claim`` with the process's number in it, and ends with ``TASK.json``. Without a result the
process has died of it. With tasks named, those are tried and nobody else's are touched.

What has broken the device for this process ends it; others go on with the rest.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

import torch

from halfbyte.kernels.trial.base import WrongResultError
from halfbyte.kernels.trial.cases import run_case
from halfbyte.kernels.trial.spec import TrialSpec, trial_tasks

Verdict = Literal["ok", "wrong", "failed", "broken", "memory"]


def main(arguments: list[str]) -> int:
    path = Path(arguments[0])
    spec = TrialSpec.from_json(path.read_text(encoding="utf-8"))
    torch.zeros(1, device=spec.device)  # whoever cannot have the device takes nothing
    if spec.device != "cpu":
        torch.cuda.set_device(spec.device)  # Triton launches on the current one
    for task in arguments[1:] or trial_tasks(spec):
        if not _claim(path.parent / f"{task}.claim"):
            continue
        verdict, reason = _try(spec, task)
        _write(path.parent / f"{task}.json", {"verdict": verdict, "reason": reason})
        if verdict == "broken":
            return 1
    return 0


def _try(spec: TrialSpec, task: str) -> tuple[Verdict, str]:
    try:
        run_case(spec, task)
        if spec.device != "cpu":
            torch.cuda.synchronize()
    except WrongResultError as error:
        return "wrong", str(error)
    except torch.OutOfMemoryError as error:
        return "memory", _first_line(error)
    except Exception as error:
        # After an illegal access nothing else works in this process.
        text = str(error)
        broken = isinstance(error, torch.AcceleratorError) or "[CUDA]" in text
        return "broken" if broken else "failed", _first_line(error)
    return "ok", ""


def _claim(path: Path) -> bool:
    """Whether the task is ours: the file is made by one process alone."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return False
    return True


def _write(path: Path, content: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content), encoding="utf-8")
    part.replace(path)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
