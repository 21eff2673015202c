"""What is done with a finished adapter, of a run or from elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.finished.opened import open_adapter

__all__ = ["open_adapter"]


def __getattr__(name: str) -> Any:
    # Lazy, so that what only looks for an adapter does not import torch.
    if name == "open_adapter":
        from halfbyte.finished import opened

        return opened.open_adapter
    raise AttributeError(f"module 'halfbyte.finished' has no attribute {name!r}")
