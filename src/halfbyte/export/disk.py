"""What is asked of a disk before something is written, and after."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from halfbyte.checkpoint.manifest import sync
from halfbyte.errors import RunError


def require_new(out: Path) -> None:
    """Raise RunError where there is something called ``out`` already."""
    if os.path.lexists(out):
        raise RunError(f"{out} is there already and is not replaced; name another --out.")


def require_space(out: Path, size: int, what: str) -> None:
    """Raise RunError where the disk of ``out``, whose folder is there, has no ``size`` bytes for
    ``what``."""
    free = shutil.disk_usage(out.parent).free
    if free < size:
        raise RunError(
            f"{what} will take {size / 1e9:.2f} GB, and the disk of {out} has {free / 1e9:.2f} GB "
            "free: make room, or name an --out on another disk."
        )


@contextmanager
def no_empty_folders(out: Path) -> Iterator[None]:
    """Folders on the way to ``out`` that are made inside go again where it does not come."""
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        yield
    finally:
        if not out.exists():
            with suppress(OSError):
                for folder in made:
                    folder.rmdir()


def sync_tree(path: Path) -> None:
    """Wait until the file or folder ``path``, with all below, is on the disk."""
    if path.is_dir() and not path.is_symlink():
        for below in path.iterdir():
            sync_tree(below)
    sync(path)
