"""Tokenized rows kept from one run to the next, found again by what they were made of."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from halfbyte.data.row_store import RowStore, RowWriter
from halfbyte.user_cache import private_folder

FOLDER = "tokens"
# Data sets that are kept; of more, the one that was used longest ago goes first.
MOST = 8


def content_key(parts: Iterable[bytes]) -> str:
    """SHA-256 of ``parts`` and of where each ends."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def find_rows(key: str) -> RowStore | None:
    """The rows kept under ``key``, if they are there and whole."""
    try:
        folder = private_folder(FOLDER) / key
        found = RowStore.read(folder)
        if found is not None:
            os.utime(folder)
    except OSError:
        return None
    return found


def keep_rows(key: str, write: Callable[[RowWriter], None]) -> RowStore:
    """Have ``write`` give its rows to files, and keep those under ``key``.

    A cache that cannot be written to is no error: the files are then this process's alone, without
    a name, and end with it. What ``write`` raises leaves nothing behind.
    """
    try:
        home = private_folder(FOLDER)
        folder = Path(tempfile.mkdtemp(prefix="part-", dir=home))
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="halfbyte-tokens-"))
        home = None
    try:
        writer = RowWriter(folder)
        write(writer)
        rows = writer.finish()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if home is None:
        shutil.rmtree(folder, ignore_errors=True)  # the maps stay
        return rows
    with suppress(OSError):
        shutil.rmtree(home / key, ignore_errors=True)
        folder.rename(home / key)
        _forget(home)
    return rows


def _forget(home: Path) -> None:
    """Remove all but the newest MOST, and what a process that died has left half-written."""
    newest = sorted(home.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
    whole = [folder for folder in newest if not folder.name.startswith("part-")]
    day = 24 * 3600
    now = newest[0].stat().st_mtime if newest else 0.0
    left = [f for f in newest if f.name.startswith("part-") and now - f.stat().st_mtime > day]
    for folder in [*whole[MOST:], *left]:
        shutil.rmtree(folder, ignore_errors=True)
