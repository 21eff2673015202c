"""Reports without pictures, for tests that look at none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from halfbyte.report import compare, plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def undrawn(name: str, height: float, fill: Callable[[Figure], None]) -> plots.Plot:
    """All that :func:`halfbyte.report.plots.draw` does but for layout and drawing."""
    from matplotlib.figure import Figure

    fill(Figure())
    return plots.Plot("<svg ></svg>", b"")


def leave_out_pictures() -> None:
    """From now on no plot is drawn in this process."""
    plots.draw = compare.draw = undrawn  # type: ignore[attr-defined]


@contextmanager
def no_pictures() -> Iterator[None]:
    """No plot is drawn meanwhile in this process."""
    kept = plots.draw, compare.draw  # type: ignore[attr-defined]
    leave_out_pictures()
    try:
        yield
    finally:
        plots.draw, compare.draw = kept  # type: ignore[attr-defined]
