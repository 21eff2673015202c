"""What a run on a GPU needs later, made ready in a thread while something else holds it up.

Nothing depends on it: what is not ready, or fails here, is made where it is needed.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halfbyte.report.plots import Plot

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


def draw_ahead(folder: Path) -> Future[dict[str, Plot]]:
    """Draw the report's plots, 0.8 s of work, while the GPU answers prompts.

    All that they show is in the records of ``folder`` by then.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    drawing = executor.submit(_plots, folder)
    executor.shutdown(wait=False)
    return drawing


def _begin(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="ahead", daemon=True).start()


def _import() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)


def _triton_key() -> None:
    with suppress(Exception):  # no public name of Triton's, and not there without it
        importlib.import_module("triton.runtime.cache").triton_key()


def _plots(folder: Path) -> dict[str, Plot]:
    from halfbyte.report.plots import plots
    from halfbyte.report.story import read_story

    return plots(read_story(folder))
