"""What every worker here does beside its own package's part.

Run by its path with a worker's path behind it, by a Python that has the package and perhaps no
halfbyte. It reads one job as JSON from standard input and writes what came of it as JSON to
standard output; an error becomes an answer as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import sys
from importlib.metadata import version
from typing import Any


def work(worker: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """``worker`` is what its file defines: ``write(job)``; ``ask(job)``, which gives the tokenizer
    that its package loads and what else it found; and ``PACKAGE``."""
    if job["do"] == "write":
        worker["write"](job)
        return {}
    tokenizer, said = worker["ask"](job)
    ids = [tokens(tokenizer, text) for text in job["texts"]]
    return {"tokens": ids, "version": version(worker["PACKAGE"]), **said}


def tokens(tokenizer: Any, text: str) -> list[int]:
    """With the beginning that the tokenizer adds, unless the text has it."""
    bos = tokenizer.bos_token
    ids: list[int] = tokenizer.encode(
        text, add_special_tokens=bos is None or not text.startswith(bos)
    )
    return ids


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    answers = os.dup(1)
    os.dup2(2, 1)  # the packages say there what they do
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answer = work(runpy.run_path(sys.argv[1]), asked)
        except ModuleNotFoundError as error:
            answer = {"missing": error.name}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
    with os.fdopen(answers, "w", encoding="utf-8") as file:
        json.dump(answer, file)
