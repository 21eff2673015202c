"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.checkpoint.manifest import sync
from halfbyte.errors import HalfbyteError, RunError
from halfbyte.export.disk import no_empty_folders, require_new, require_space, sync_tree
from halfbyte.model.wording import reason

# Beside the weights: a tokenizer takes up to 35 MB, the rest little.
BESIDE = 48 << 20


@contextmanager
def new_folder(out: Path, size: int = 0, what: str = "the model") -> Iterator[Path]:
    """Where to write what ``out`` will hold; it gets that name when the context ends well.

    Until then it is a hidden folder beside it. All files are on the disk before the name is given,
    and whatever goes wrong, nothing is left. ``size`` is how many bytes ``what`` takes, for a look
    at the disk beforehand. Raises RunError where ``out`` exists, where there is too little room,
    and where nothing can be written there.
    """
    require_new(out)
    partial = out.parent / f".{out.name}.partial"
    with no_empty_folders(out):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            if partial.exists():  # of one that was killed
                shutil.rmtree(partial)
            require_space(out, size + BESIDE, what)
            partial.mkdir()
        except OSError as error:
            raise RunError(
                f"{out} cannot be written: {reason(error)}; name another --out."
            ) from error
        try:
            yield partial
            sync_tree(partial)
            require_new(out)
            os.rename(partial, out)
            sync(out.parent)
        except HalfbyteError:
            raise
        except Exception as error:
            # Libraries written in Rust have errors of their own for a full disk.
            if not _is_of_disk(error):
                raise
            raise RunError(
                f"{what} could not be written to {out}, and nothing of it is kept: "
                f"{reason(error)}; make room, or name an --out on another disk."
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _is_of_disk(error: Exception) -> bool:
    if isinstance(error, OSError):
        return True
    words = str(error).lower()
    return any(sign in words for sign in ("no space left", "storagefull", "disk quota", "os error"))
