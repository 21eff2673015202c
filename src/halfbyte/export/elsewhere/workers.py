"""Packages that write other formats, asked in a process of their own."""

from __future__ import annotations

import errno
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
import torch
from torch import Tensor

from halfbyte.errors import ModelError
from halfbyte.export.elsewhere import compress_worker, mlx_worker, worker_frame
from halfbyte.export.elsewhere.types import ElsewhereType, Target
from halfbyte.model.wording import reason
from halfbyte.plan.device import Device

# A disk with less room is taken for full where a package could not write.
_FULL = 1 << 20
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Loaded:
    """What the package makes of a folder: ids of each text, logits [T, vocabulary] of each row in
    fp32, the chat template, the ids that end an answer; how many matrices are ``quantized``, and
    the names of those that are not (``kept``)."""

    tokens: list[list[int]]
    logits: list[Tensor]
    template: str | None
    ends: set[int]
    quantized: int
    kept: list[str]
    version: str


@dataclass(frozen=True)
class Workshop:
    """A Python that has the package of ``target``, and where it is to calculate."""

    target: Target
    python: str
    device: Device

    def write(
        self,
        model: Path,
        out: Path,
        type: ElsewhereType,
        group: int | None,
        rows: Sequence[Sequence[int]] = (),
    ) -> None:
        """Write the model in the folder ``model`` into the empty folder ``out``.

        ``rows`` of ids are what a calibrated format is made with. Raises ModelError for what the
        package does not take, OSError for a full disk.
        """
        job = {
            "do": "write",
            "model": str(model.resolve()),
            "out": str(out.resolve()),
            "method": self.target.name,
            "bits": type.bits,
            "group": group,
            "dtype": _DTYPES[type.dtype],
            "rows": _plain(rows),
            "in_fp32": self.device.kind == "cpu" and not self.device.bf16_native,
        }
        self._work(job, out, "could not write")

    def load(self, folder: Path, texts: Sequence[str], rows: Sequence[Sequence[int]]) -> Loaded:
        """What the package itself loads of ``folder``. Raises ModelError where it does not."""
        with tempfile.TemporaryDirectory() as place:
            logits = Path(place) / "logits.npz"
            job = {
                "do": "ask",
                "model": str(folder.resolve()),
                "texts": list(texts),
                "rows": _plain(rows),
                "logits": str(logits),
            }
            answer = self._work(job, folder, "does not load")
            with np.load(logits, allow_pickle=False) as found:
                values = [torch.from_numpy(found[str(at)]) for at in range(len(rows))]
        return Loaded(
            tokens=answer["tokens"],
            logits=values,
            template=answer["template"],
            ends=set(answer["ends"]),
            quantized=int(answer["quantized"]),
            kept=answer["kept"],
            version=str(answer["version"]),
        )

    def _work(self, job: dict[str, Any], folder: Path, failing: str) -> dict[str, Any]:
        worker = mlx_worker if self.target.name == "mlx" else compress_worker
        files = [str(Path(str(module.__file__)).resolve()) for module in (worker_frame, worker)]
        # Nothing of what is made is on a network.
        surroundings = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self.device.kind == "cpu":
            surroundings["CUDA_VISIBLE_DEVICES"] = ""
        with tempfile.TemporaryDirectory() as place:  # for files that a package leaves where it is
            try:
                done = subprocess.run(
                    [self.python, "-I", *files],
                    input=json.dumps(job).encode("utf-8"),
                    capture_output=True,
                    check=False,
                    env=surroundings,
                    cwd=place,
                )
            except OSError as error:
                raise ModelError(
                    f"{self.python} cannot be run ({error.strerror}); mend or unset "
                    f"{self.target.variable}."
                ) from error
        answer = _answer(done)
        if "missing" in answer:
            raise ModelError(
                f"{self.python} has no {answer['missing']}, which --to {self.target.name} needs: "
                f"{_where(self.target)}."
            )
        if "failed" in answer:
            if shutil.disk_usage(folder.parent).free < _FULL or "No space left" in answer["failed"]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            said = reason(ValueError(answer["failed"]))
            raise ModelError(
                f"{self.target.package} {failing} this model ({said}); nothing is kept. Try "
                "--to gguf, or halfbyte merge and a program that knows it."
            )
        return answer


def find_workshop(target: Target, device: Device) -> Workshop:
    """A Python with the package of ``target``: the one that the variable names, or this one.

    Raises ModelError where there is none.
    """
    named = os.environ.get(target.variable)
    if named:
        # By its name alone it would be looked for where the worker runs.
        return Workshop(target, shutil.which(named) or named, device)
    if find_spec(target.module) is None:
        raise ModelError(
            f"--to {target.name} is written by {target.package}, which is not here: "
            f"{_where(target)}."
        )
    return Workshop(target, sys.executable, device)


def _where(target: Target) -> str:
    return (
        f"pip install 'halfbyte[{target.extra}]', or name a Python that has it with "
        f"{target.variable}"
    )


def _answer(done: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
    if done.returncode == 0:
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
            return answer
        except ValueError:
            return {"failed": "its Python gave no answer"}
    lines = [line.strip() for line in done.stderr.decode("utf-8", "replace").splitlines()]
    said = [line for line in lines if line]
    return {"failed": said[-1] if said else f"it ended with code {done.returncode}"}


def _plain(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[int(token) for token in row] for row in rows]
