"""The manifest of a checkpoint: which files it has, how long they are, and their SHA-256."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any

from halfbyte.data.text_file import sha256_of
from halfbyte.errors import RunError

NAME = "manifest.json"
FORMAT = 1
LONGEST = 1 << 20  # bytes of a manifest; one of a checkpoint has some hundred to a few thousand


def write_manifest(folder: Path) -> None:
    """List and sync every file of ``folder``; the manifest is written, and synced, last."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": sha256_of(path),
        }
    text = json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n"
    (folder / NAME).write_text(text, encoding="utf-8")
    sync(folder / NAME)
    for inside in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync(inside)


def check_manifest(folder: Path) -> None:
    """Raises RunError, naming the file, unless ``folder`` holds what its manifest lists."""
    for name, listed in _read(folder).items():
        path = folder / name
        try:
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, a link leads away
                raise _damaged(folder, f"{name} is no file")
            size = found.st_size
            if size != listed["bytes"]:
                raise _damaged(folder, f"{name} has {size:,} bytes in place of {listed['bytes']:,}")
            if sha256_of(path) != listed["sha256"]:
                raise _damaged(folder, f"{name} is not what was written")
        except OSError as error:
            raise _damaged(folder, f"{name}: {error.strerror}") from error


def _read(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    try:
        if path.stat().st_size > LONGEST:
            raise _damaged(folder, f"its {NAME} is too long to be one")
        raw = json.loads(path.read_text(encoding="utf-8"))
        files = raw["files"]
        if raw["format"] != FORMAT:
            raise _damaged(folder, f"its format is {raw['format']!r}, of another halfbyte")
        for name, listed in files.items():
            inside = PurePosixPath(name)
            if inside.is_absolute() or ".." in inside.parts or "\\" in name or not inside.parts:
                raise _damaged(folder, f"its {NAME} names {name!r}, which is not in the folder")
            if not isinstance(listed["bytes"], int) or not isinstance(listed["sha256"], str):
                raise _damaged(folder, f"its {NAME} cannot be read")
    except OSError as error:
        raise _damaged(folder, f"{NAME}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(folder, f"its {NAME} cannot be read") from error
    return dict(files)


def sync(path: Path) -> None:
    """Have the file or folder at ``path`` written to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _damaged(folder: Path, what: str) -> RunError:
    return RunError(
        f"the checkpoint {folder} is damaged ({what}); remove that folder to go on from the one "
        "before it."
    )
