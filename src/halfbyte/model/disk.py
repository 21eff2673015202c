"""Room on the disk, looked at before something large is written."""

from __future__ import annotations

import shutil
from pathlib import Path

from halfbyte.errors import ModelError

# Left free, so that a run that follows can write its own files.
_MARGIN = 200 << 20


def require_space(folder: Path, wanted: int, what: str) -> None:
    """Raise ModelError where ``wanted`` bytes for ``what`` do not fit on the disk of ``folder``."""
    there = folder.expanduser().absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < wanted + _MARGIN:
        raise ModelError(
            f"{what} take {wanted / 1e9:.1f} GB, and the disk of {folder} has {free / 1e9:.1f} GB "
            "free: make room, or keep models elsewhere (HF_HOME, XDG_CACHE_HOME)."
        )
