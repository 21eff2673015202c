"""The user's own cache directory, and folders in it that nobody else may read or write."""

from __future__ import annotations

import os
import stat
from pathlib import Path

NAME = "halfbyte"


def user_cache() -> Path:
    """$XDG_CACHE_HOME, which counts if it is an absolute path, or ~/.cache."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return Path(named) if os.path.isabs(named) else Path("~/.cache").expanduser()


def private_folder(name: str) -> Path:
    """The folder ``name`` of halfbyte's in the user's cache directory, made 0700 if it is missing.

    Raises OSError where it, or what it lies in, is not this user's alone or cannot be made.
    """
    home = user_cache() / NAME
    home.parent.mkdir(parents=True, exist_ok=True)
    for folder in (home, home / name):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.stat()
        if hasattr(os, "getuid") and found.st_uid != os.getuid():
            raise OSError(0, "it belongs to another user", str(folder))
        if stat.S_IMODE(found.st_mode) & 0o022:
            raise OSError(0, "others may write to it", str(folder))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(0, "it cannot be written to", str(folder))
    return home / name
