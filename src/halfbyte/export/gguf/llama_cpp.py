"""llama.cpp on this machine: its quantizer, and what it makes of a file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.errors import ModelError
from halfbyte.export.gguf import llama_worker
from halfbyte.export.gguf.types import WeightType

# A Python that has llama-cpp-python, where halfbyte's own has it not.
PYTHON = "HALFBYTE_LLAMA_PYTHON"
_PROGRAM = "llama-quantize"
_LONGEST_REASON = 200


@dataclass(frozen=True)
class Quantizer:
    """Either the program ``llama-quantize``, or a Python with the binding."""

    program: str | None
    python: str | None

    @property
    def name(self) -> str:
        return _PROGRAM if self.program else "llama-cpp-python"

    def quantize(self, source: Path, target: Path, type: WeightType) -> None:
        """Write ``target`` in ``type`` of the GGUF file ``source``. Raises ModelError."""
        threads = os.cpu_count() or 1
        if self.program is not None:
            words = [self.program, str(source), str(target), type.name.upper(), str(threads)]
            try:
                done = subprocess.run(words, capture_output=True, check=False)
            except OSError as error:
                raise ModelError(
                    f"{self.program} cannot be run ({error.strerror}); name llama.cpp's "
                    f"{_PROGRAM} with --llama-quantize."
                ) from error
            failed, said = done.returncode != 0, done.stderr.decode("utf-8", "replace")
        else:
            assert self.python is not None
            job = {"do": "quantize", "source": str(source), "target": str(target)}
            answer, said = _work(self.python, {**job, "type": int(type.number), "threads": threads})
            failed = answer is None or answer["code"] != 0
        if failed or not target.is_file():
            raise ModelError(
                f"llama.cpp could not write {type.name} ({_last_words(said)}); nothing is kept. "
                "Try --type q8_0, which needs no llama.cpp."
            )


def find_quantizer(asked: Path | None = None) -> Quantizer:
    """``asked``, ``llama-quantize`` on the PATH, or the binding. Raises ModelError for none."""
    if asked is not None:
        if not os.access(asked, os.X_OK) or asked.is_dir():
            raise ModelError(f"{asked} is no program; name llama.cpp's {_PROGRAM}.")
        return Quantizer(str(asked), None)
    program = shutil.which(_PROGRAM)
    if program is not None:
        return Quantizer(program, None)
    python = find_python()
    if python is None:
        raise ModelError(
            "K-quants and IQ types are written by llama.cpp, which is not here: pip install "
            f"'halfbyte[llama-cpp]', put {_PROGRAM} on the PATH, or choose --type q8_0 or q4_0."
        )
    return Quantizer(None, python)


def find_python() -> str | None:
    """A Python with llama-cpp-python, if there is one."""
    named = os.environ.get(PYTHON)
    if named:
        return named
    return sys.executable if find_spec("llama_cpp") is not None else None


@dataclass(frozen=True)
class Asked:
    """What llama.cpp makes of a file: ids of each text, logits [T, vocabulary] of each row."""

    tokens: list[list[int]]
    logits: list[np.ndarray]
    version: str


def ask_llama_cpp(
    python: str,
    model: Path,
    texts: Sequence[str],
    rows: Sequence[Sequence[int]],
    *,
    special: bool = True,
    lora: Path | None = None,
) -> Asked:
    """Ask llama.cpp. ``special``: what the file says of a token before a text is done.

    Raises ModelError where it does not take the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        logits = Path(folder) / "logits.npz"
        job: dict[str, Any] = {
            "do": "ask",
            "model": str(model),
            "lora": None if lora is None else str(lora),
            "texts": list(texts),
            "rows": [[int(token) for token in row] for row in rows],
            "special": special,
            "logits": str(logits),
            "threads": os.cpu_count() or 1,
        }
        answer, said = _work(python, job)
        if answer is None:
            raise ModelError(f"llama.cpp does not take {model.name}: {_last_words(said)}.")
        with np.load(logits, allow_pickle=False) as found:
            values = [found[str(number)] for number in range(len(rows))]
    return Asked(answer["tokens"], values, str(answer["version"]))


def _work(python: str, job: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The worker's answer (None where it ended otherwise), and what was said meanwhile."""
    assert llama_worker.__file__ is not None
    try:
        done = subprocess.run(
            [python, "-I", llama_worker.__file__],
            input=json.dumps(job).encode("utf-8"),
            capture_output=True,
            check=False,
        )
    except OSError as error:
        raise ModelError(
            f"{python} cannot be run ({error.strerror}); mend or unset {PYTHON}."
        ) from error
    said = done.stderr.decode("utf-8", "replace")
    if done.returncode != 0:
        return None, said or f"it ended with code {done.returncode}"
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer, said


def _last_words(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:_LONGEST_REASON].rstrip(".") if lines else "it said nothing"
