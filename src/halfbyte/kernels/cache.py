"""Where compiled kernels are kept from one run to the next.

In the user's own cache directory, apart for each version of what compiles them and each kind of
device, and for nobody else to write: what lies there is machine code that later runs execute.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from halfbyte.user_cache import private_folder

VARIABLE = "TRITON_CACHE_DIR"  # read by Triton whenever it compiles


@dataclass(frozen=True)
class CacheFolder:
    """``path``, and why it is not the one in the user's cache directory (empty if it is)."""

    path: Path
    temporary_because: str = ""


def cache_name(triton: str, torch: str, capability: tuple[int, int], device: str) -> str:
    """The folder's name: versions of Triton and PyTorch, compute capability and the card's name."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    versions = "-".join(re.sub(r"[^\w.+]+", "-", v) for v in ("triton", triton, "torch", torch))
    return f"{versions}-sm{capability[0]}{capability[1]}-{slug}"


def use_cache(name: str) -> CacheFolder:
    """Have Triton keep what it compiles in the user's cache directory, in a folder ``name``.

    To be called before the first kernel is launched. A directory that the user has set is left
    alone. Where the folder belongs to somebody else, may be written by others or cannot be made, a
    temporary one of this process stands in for it.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return CacheFolder(Path(chosen))
    try:
        found = CacheFolder(private_folder(name))
    except OSError as error:
        why = error.strerror or str(error)
        if error.filename:
            why = f"{error.filename}: {why}"
        path = Path(tempfile.mkdtemp(prefix="halfbyte-triton-"))  # made 0700
        atexit.register(shutil.rmtree, path, ignore_errors=True)
        found = CacheFolder(path, why)
    os.environ[VARIABLE] = str(found.path)  # for this process and those that it starts
    return found
