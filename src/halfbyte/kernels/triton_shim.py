"""Triton where it is installed. Without it kernels cannot be launched, and nothing else changes."""

from __future__ import annotations

from typing import Any


class _Absent:
    """Stands for the module: any attribute is there, and decorates by leaving as it is."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, function: Any = None, **_: Any) -> Any:
        return self if function is None else function


try:
    import triton
    import triton.language as tl

    INSTALLED = True
except ImportError:
    triton = tl = _Absent()
    INSTALLED = False

__all__ = ["INSTALLED", "tl", "triton"]
