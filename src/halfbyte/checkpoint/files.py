"""Checkpoints in a run folder: written, read, counted and removed.

A checkpoint is a folder ``checkpoints/step-N`` which alone is enough to go on from:

    state.safetensors    adapter, optimizer and loss scaler
    best.safetensors     the adapter of the lowest held-out loss, where that is of another step
    state.json           the step and what led to it (CheckpointState)
    recipe.yaml, recipe.asked.yaml, strategy.json, initial_adapter/    as the run folder has them
    events.jsonl         the record up to the step
    manifest.json        bytes and SHA-256 of all these

It is written under a temporary name, synced and renamed: one with its final name is whole, and one
whose manifest does not agree was damaged later. A process that is killed leaves hidden folders
behind, which the next one removes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.checkpoint.manifest import check_manifest, sync, write_manifest
from halfbyte.checkpoint.state import CheckpointState
from halfbyte.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

    from halfbyte.checkpoint.snapshot import Snapshot

TENSORS, BEST, STATE = "state.safetensors", "best.safetensors", "state.json"
EVENTS = "events.jsonl"
ADAPTER = "adapter."  # how the names of the adapter's tensors begin
_STEP = "step-"


def save_checkpoint(folder: Path, snapshot: Snapshot) -> Path:
    """Write ``folder/step-N`` and return it; an older folder of that name is replaced.

    Raises OSError, or what safetensors makes of one, where it cannot be written; nothing of it is
    left then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{_STEP}{snapshot.state.step}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write(partial, snapshot)
        write_manifest(partial)
        remove_checkpoint(final)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # half a checkpoint is of no use to anybody
        raise
    sync(folder)
    return final


def _write(partial: Path, snapshot: Snapshot) -> None:
    from safetensors.torch import save_file

    save_file({name: t.contiguous() for name, t in snapshot.tensors.items()}, partial / TENSORS)
    if snapshot.best is not None:
        save_file({name: t.to("cpu") for name, t in snapshot.best.items()}, partial / BEST)
    state = replace(snapshot.state, hashes=snapshot.state.hashes | snapshot.weights())
    text = json.dumps(state.plain(), indent=1) + "\n"
    (partial / STATE).write_text(text, encoding="utf-8")
    for name in snapshot.files:
        path = snapshot.folder / name
        if path.is_dir():
            shutil.copytree(path, partial / name)
        elif path.exists():
            shutil.copyfile(path, partial / name)
    with (snapshot.folder / EVENTS).open("rb") as record, (partial / EVENTS).open("wb") as copy:
        left = snapshot.events_bytes
        while left and (piece := record.read(min(left, 1 << 20))):
            copy.write(piece)
            left -= len(piece)


def load_checkpoint(path: Path) -> tuple[CheckpointState, dict[str, Tensor]]:
    """The state and the tensors (on the CPU) of a checkpoint folder.

    Raises RunError where it is missing, or not as its manifest says.
    """
    check_manifest(path)
    return read_state(path), _load_tensors(path / TENSORS)


def load_best(path: Path, state: CheckpointState) -> dict[str, Tensor] | None:
    """The adapter of the lowest held-out loss by then; None where none was measured.

    Raises RunError as ``load_checkpoint`` does.
    """
    if state.best_step is None:
        return None
    at = path / (TENSORS if state.best_step == state.step else BEST)
    return {name: t for name, t in _load_tensors(at).items() if name.startswith(ADAPTER)}


def read_state(path: Path) -> CheckpointState:
    """What the checkpoint in ``path`` holds beside its tensors. Raises RunError."""
    try:
        return CheckpointState.of_plain(json.loads((path / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error


def _load_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        # Read and not mapped: the file may be removed, or its disk be gone, while the run goes on.
        return load(path.read_bytes())
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise _unreadable(path.parent, error) from error


def _unreadable(path: Path, error: Exception) -> RunError:
    return RunError(
        f"the checkpoint {path} cannot be read ({type(error).__name__}: {error}); "
        "remove that folder to go on from the one before it."
    )


def checkpoints_in(folder: Path) -> list[Path]:
    """Finished checkpoints of ``folder``, the earliest first."""
    found = [path for path in folder.glob(f"{_STEP}*") if path.is_dir() and _number(path) >= 0]
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    digits = path.name.removeprefix(_STEP)
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 16 else -1


def kept_steps(folder: Path, keep_last: int, best_step: int | None) -> set[int]:
    """The steps of the checkpoints that stay: the last ``keep_last`` and the best one."""
    steps = [_number(path) for path in checkpoints_in(folder)]
    return {*steps[-keep_last:], *(step for step in steps if step == best_step)}


def prune_checkpoints(
    folder: Path, keep_last: int, best_step: int | None, spare: Collection[int] = ()
) -> None:
    """Remove all but the last ``keep_last`` checkpoints, the best one and the steps ``spare``."""
    kept = kept_steps(folder, keep_last, best_step).union(spare)
    for path in checkpoints_in(folder):
        if _number(path) not in kept:
            remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint; under its own name it is there whole or not at all."""
    if not path.exists():
        return
    going = path.with_name(f".{path.name}.removed")
    shutil.rmtree(going, ignore_errors=True)
    path.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def remove_remains(folder: Path) -> None:
    """Remove what a process that was killed had not finished writing or removing."""
    for pattern in (f".{_STEP}*.partial", f".{_STEP}*.removed"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
