"""The assembly of a run from a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.run.assembly import Rehearsal, rehearse
    from halfbyte.run.folder import latest_run
    from halfbyte.run.loss_table import LossTable
    from halfbyte.run.outcome import Run
    from halfbyte.run.training import train

__all__ = ["LossTable", "Rehearsal", "Run", "latest_run", "rehearse", "train"]

_MODULES = {
    "LossTable": "loss_table",
    "Rehearsal": "assembly",
    "rehearse": "assembly",
    "latest_run": "folder",
    "Run": "outcome",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that what only looks at a run's folder does not import torch.
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"halfbyte.run.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'halfbyte.run' has no attribute {name!r}")
