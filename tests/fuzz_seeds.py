"""The real files that ``make fuzz`` changes: those of the tests' fixtures, made outside pytest."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import gguf

import conftest
from test_gguf import write_gguf


class _Folders:
    """What the fixtures want of pytest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def mktemp(self, name: str) -> Path:
        made = self._folder / name
        made.mkdir(parents=True)
        return made


def small_model(folder: Path) -> Path:
    """A model's folder of some 60 kB."""
    return cast(Path, cast(Any, conftest.tiny_model).__wrapped__(_Folders(folder)))


def small_rows(folder: Path) -> Path:
    return cast(Path, cast(Any, conftest.tiny_rows).__wrapped__(_Folders(folder)))


def small_gguf(path: Path) -> Path:
    """A Llama of two layers."""
    return write_gguf(path, "llama", [gguf.GGMLQuantizationType.Q8_0], {})
