"""Tokenized rows kept from one run to the next, found again by what they were made of."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from array import array
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from halfbyte.data.rendered import Rendered
from halfbyte.data.row_store import RowStore, RowWriter
from halfbyte.data.spool import no_room, roomy_folder
from halfbyte.user_cache import private_folder

FOLDER = "tokens"
# Data sets that are kept; of more, the one that was used longest ago goes first.
MOST = 8
_RENDERED = "rendered.npz"
_NUMBERS = ("places", "turns", "turn_ends", "refused", "refused_why")

Kept = tuple[RowStore, Rendered]


def content_key(parts: Iterable[bytes]) -> str:
    """SHA-256 of ``parts`` and of where each ends."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def find_rows(key: str) -> Kept | None:
    """The rows kept under ``key``, if they are there and whole."""
    try:
        folder = private_folder(FOLDER) / key
        found = _read(folder)
        if found is not None:
            os.utime(folder)
    except OSError:
        return None
    return found


def keep_rows(key: str | None, write: Callable[[RowWriter], Rendered]) -> Kept:
    """Have ``write`` give its rows to files, and keep those under ``key``.

    Without a key, and where the cache cannot be written to, which is no error, the files are this
    process's alone, without a name, and end with it; ``write`` may then be called twice. What it
    raises leaves nothing behind. Raises DataError where there is no room for the rows anywhere.
    """
    if key is not None:
        with suppress(OSError):
            home = private_folder(FOLDER)
            _forget(home, MOST - 1)
            folder = Path(tempfile.mkdtemp(prefix="part-", dir=home))
            found = _write(folder, write)
            try:
                shutil.rmtree(home / key, ignore_errors=True)
                folder.rename(home / key)
            except OSError:  # another process was as fast
                shutil.rmtree(folder, ignore_errors=True)
            return found
    try:
        folder = Path(tempfile.mkdtemp(prefix="halfbyte-tokens-", dir=roomy_folder()))
        found = _write(folder, write)
    except OSError as error:
        raise no_room(roomy_folder(), error) from error
    shutil.rmtree(folder, ignore_errors=True)  # the maps stay
    return found


def _write(folder: Path, write: Callable[[RowWriter], Rendered]) -> Kept:
    writer = RowWriter(folder)
    try:
        rendered = write(writer)
        reasons = json.dumps(rendered.reasons).encode()
        numbers = {name: np.asarray(getattr(rendered, name)) for name in _NUMBERS}
        numbers["reasons"] = np.frombuffer(reasons, np.uint8)
        np.savez(folder / _RENDERED, allow_pickle=False, **numbers)
        return writer.finish(), rendered
    except BaseException:
        writer.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _read(folder: Path) -> Kept | None:
    rows = RowStore.read(folder)
    if rows is None:
        return None
    try:
        with np.load(folder / _RENDERED, allow_pickle=False) as stored:
            numbers = {name: array("q", stored[name].tobytes()) for name in _NUMBERS}
            reasons = [(kind, why) for kind, why in json.loads(stored["reasons"].tobytes())]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    rendered = Rendered(**numbers, reasons=reasons)
    return (rows, rendered) if len(rendered.places) == len(rows) else None


def _forget(home: Path, most: int) -> None:
    """Remove all but the ``most`` newest, and what a process that died left half-written."""
    newest = sorted(home.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
    whole = [folder for folder in newest if not folder.name.startswith("part-")]
    day = 24 * 3600
    now = newest[0].stat().st_mtime if newest else 0.0
    left = [f for f in newest if f.name.startswith("part-") and now - f.stat().st_mtime > day]
    for folder in [*whole[most:], *left]:
        shutil.rmtree(folder, ignore_errors=True)
