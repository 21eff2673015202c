"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder ``checkpoints/step-N`` with ``state.safetensors`` (adapter, optimizer,
loss scaler) and ``state.json`` (the step and what led to it). Batches and dropout masks are
functions of the step and the seed, so the step is all that the data's position needs. The folder
is written under a temporary name, synced and renamed: one with the final name is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from halfbyte.errors import RunError

TENSORS, STATE = "state.safetensors", "state.json"


@dataclass(frozen=True)
class CheckpointState:
    """What is not a tensor."""

    step: int  # finished optimizer steps
    held_out_loss: float | None  # at this step, where it was measured
    best_step: int | None  # the step with the lowest held-out loss so far
    best_loss: float | None
    versions: dict[str, str]
    device: str
    fingerprint: str  # of what must be the same for the run to go on
    skipped: int = 0  # of the finished steps, those that made no update


def save_checkpoint(folder: Path, state: CheckpointState, tensors: dict[str, Tensor]) -> Path:
    """Write ``folder/step-N`` and return it; an older folder of that name is replaced."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state.step}"
    partial = folder / f".step-{state.step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    plain = {name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}
    try:
        save_file(plain, partial / TENSORS)
        (partial / STATE).write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
        for path in (partial / TENSORS, partial / STATE, partial):
            _sync(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # half a checkpoint is of no use to anybody
        raise
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(folder)
    return final


def load_checkpoint(path: Path) -> tuple[CheckpointState, dict[str, Tensor]]:
    """The state and the tensors (on the CPU) of a checkpoint folder.

    Raises RunError where it is missing or damaged.
    """
    from safetensors.torch import load_file

    try:
        raw: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        return CheckpointState(**raw), load_file(path / TENSORS)
    except Exception as error:
        raise RunError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}: {error}); "
            "remove that folder to go on from the one before it."
        ) from error


def checkpoints_in(folder: Path) -> list[Path]:
    """Finished checkpoints of ``folder``, the earliest first."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def prune_checkpoints(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Remove all but the last ``keep_last`` checkpoints and the best one."""
    for path in checkpoints_in(folder)[:-keep_last]:
        if int(path.name[5:]) != best_step:
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
