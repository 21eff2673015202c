"""A file that is there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.checkpoint.manifest import sync
from halfbyte.errors import RunError
from halfbyte.export.disk import no_empty_folders, require_new, require_space
from halfbyte.model.wording import reason

# Left free on the disk beside what is written.
_SPARE = 16 << 20


@contextmanager
def new_file(out: Path, size: int = 0) -> Iterator[Path]:
    """Where to write what ``out`` will hold; it gets that name when the context ends well.

    Whatever goes wrong, nothing is left. ``size`` is how many bytes will be there at most at once,
    for a look at the disk beforehand. Raises RunError where ``out`` exists, where there is too
    little room, and where nothing can be written there.
    """
    require_new(out)
    partial = out.with_name(f".{out.name}.partial")
    with no_empty_folders(out):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            require_space(out, size + _SPARE, out.name)
            yield partial
            sync(partial)
            require_new(out)
            os.replace(partial, out)
            sync(out.parent)
        except OSError as error:
            raise RunError(
                f"{out} could not be written ({reason(error)}), and nothing of it is kept; make "
                "room, or name another --out."
            ) from error
        finally:
            partial.unlink(missing_ok=True)
