"""Libraries that the end of a run needs, imported while a GPU makes the steps."""

from __future__ import annotations

import importlib
import threading

# The report's plots: 0.6 s, for which the end of a run would wait.
LIBRARIES = ("matplotlib.figure", "matplotlib.backends.backend_agg")


def import_ahead() -> None:
    """Begin to import them beside what this process does. Nothing depends on it.

    For runs on a GPU, which has steps queued while its host imports.
    """
    threading.Thread(target=_import, name="imports", daemon=True).start()


def _import() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
