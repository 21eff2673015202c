"""What a run on a GPU needs later, made ready in a thread while something else holds it up.

Nothing depends on it: what is not ready, or fails here, is made where it is needed.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from contextlib import suppress

# The report's plots: 0.6 s, for which the end of a run would wait.
LIBRARIES = ("matplotlib.figure", "matplotlib.backends.backend_agg")


def import_ahead() -> None:
    """Import what the end of the run needs, while steps are queued on the GPU."""
    _begin(_import)


def key_ahead() -> None:
    """Have Triton make the key of its cache, while transformers is imported.

    It hashes all of its own files, which takes 0.4 s and lets other threads run.
    """
    _begin(_triton_key)


def _begin(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="ahead", daemon=True).start()


def _import() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)


def _triton_key() -> None:
    with suppress(Exception):  # no public name of Triton's, and not there without it
        importlib.import_module("triton.runtime.cache").triton_key()
