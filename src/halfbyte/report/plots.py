"""The plots of a run, drawn once and kept as SVG (for the page) and PNG (for the folder).

Matplotlib is imported on use, through its objects and not ``pyplot``, so that no state and no
window system is touched. The same records give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halfbyte.report.story import Story

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1d2733", "#5b6875", "#e3e8ed"
TRAIN, HELD_OUT, BASE, SECOND = "#1f5f8b", "#c2571a", "#6b7785", "#3f7d4e"
NOTICED = "#b03a5b"
COLOURS = (TRAIN, HELD_OUT, SECOND, "#7a4f9a", "#9a7b1f", "#b03a5b")

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, found and copied
    "svg.hashsalt": "halfbyte",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#b8c1ca",
    "axes.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "legend.framealpha": 0.9,
    "legend.edgecolor": "none",
    "legend.fontsize": 9,
}


@dataclass(frozen=True)
class Plot:
    svg: str  # an <svg> element whose ids begin with the plot's name
    png: bytes


def plots(story: Story) -> dict[str, Plot]:
    """Every plot by its name; none where no step was made."""
    if not story.steps:
        return {}
    drawings: dict[str, tuple[float, Callable[[Figure], None]]] = {
        "loss": (3.5, lambda figure: _loss(figure, story)),
        "learning_rate": (3.7, lambda figure: _rates(figure, story)),
        "speed": (3.7, lambda figure: _speed(figure, story)),
    }
    return {name: draw(name, height, fill) for name, (height, fill) in drawings.items()}


def draw(name: str, height: float, fill: Callable[[Figure], None]) -> Plot:
    """A figure 7.4 inches wide that ``fill`` draws on."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The defaults and not the user's own style, except which windows are opened: none is.
    style: Any = {k: v for k, v in matplotlib.rcParamsDefault.items() if "backend" not in k}
    style.update(_STYLE)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.4, height), layout="constrained")
        fill(figure)
        svg, png = io.StringIO(), io.BytesIO()
        # savefig would draw each twice: 1.0 s for a run's plots, this way 0.7.
        as_svg: Any = FigureCanvasSVG(figure)
        as_svg.print_svg(svg, metadata={"Date": None, "Creator": None})
        figure.set_layout_engine("none")  # it is laid out
        figure.set_dpi(160)
        as_png: Any = FigureCanvasAgg(figure)
        as_png.print_png(png, metadata={"Software": None})
    return Plot(_inline(svg.getvalue(), name), png.getvalue())


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """At each place the mean of the last ``window`` values up to it, fewer at the beginning."""
    return [
        sum(part) / len(part)
        for part in (values[max(0, i - window + 1) : i + 1] for i in range(len(values)))
    ]


def prepare(axes: Axes, ylabel: str, xlabel: str = "") -> None:
    """The look of every panel."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_ylabel(ylabel)
    if xlabel:
        axes.set_xlabel(xlabel)
    axes.tick_params(length=3)
    axes.margins(x=0.015)


def _loss(figure: Figure, story: Story) -> None:
    axes = figure.add_subplot()
    prepare(axes, "loss (nats per token)", "step")
    made = [s for s in story.steps if not s.left_out]
    numbers = [s.step for s in made]
    losses = [s.loss for s in made]
    window = min(story.recipe.training.logging_steps, len(losses))
    axes.plot(numbers, finite(losses), color=TRAIN, alpha=0.28, linewidth=0.9, label="each step")
    if window > 1:
        mean = finite(running_mean(losses, window))
        # Before a whole window has passed the mean is of fewer steps, so the line begins after it.
        axes.plot(
            numbers[window - 1 :],
            mean[window - 1 :],
            color=TRAIN,
            linewidth=1.9,
            label=f"training loss, mean of {window} steps",
        )
    held_out = [(e.step, e.loss) for e in story.evaluations]
    if held_out:
        if story.quantized_base:
            held_out.insert(0, (0, story.quantized_base.loss))
        steps, values = zip(*held_out, strict=True)
        axes.plot(
            steps,
            finite(values),
            color=HELD_OUT,
            linewidth=1.6,
            marker="o",
            markersize=4.5,
            label="held-out loss",
        )
    if story.base:
        axes.axhline(
            finite([story.base.loss])[0],
            color=BASE,
            linewidth=1.1,
            linestyle=(0, (5, 3)),
            label="base model, held-out",
        )
    if story.kept is not None and story.adapter is not None:
        axes.plot(
            [story.kept.step],
            finite([story.adapter.loss]),
            linestyle="none",
            marker="o",
            markersize=9.5,
            markerfacecolor="none",
            markeredgecolor=INK,
            markeredgewidth=1.3,
            label="the adapter that is kept",
        )
    for at, step in enumerate(sorted({e.step for e in story.noticed})):
        axes.axvline(
            step,
            color=NOTICED,
            linewidth=1.0,
            linestyle=(0, (1, 2)),
            label="noticed while it ran" if at == 0 else None,
        )
    axes.legend(loc="upper right", handlelength=1.8, labelspacing=0.35)


def _rates(figure: Figure, story: Story) -> None:
    numbers = [s.step for s in story.steps]
    upper, lower = _two(figure)
    prepare(upper, "learning rate")
    upper.plot(numbers, [s.learning_rate for s in story.steps], color=TRAIN, linewidth=1.8)
    upper.set_ylim(bottom=0)
    upper.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=False)
    prepare(lower, "gradient norm", "step")
    norms = finite([s.grad_norm for s in story.steps])
    lower.plot(numbers, norms, color=HELD_OUT, linewidth=1.2)
    clip = story.recipe.training.max_grad_norm
    if clip:
        label = f"clipped above {clip:g}"
        lower.axhline(clip, color=BASE, linewidth=1.1, linestyle=(0, (5, 3)), label=label)
        lower.legend(loc="upper right")
    lower.set_ylim(bottom=0)


def _speed(figure: Figure, story: Story) -> None:
    numbers = [s.step for s in story.steps]
    upper, lower = _two(figure)
    prepare(upper, "tokens/s")
    speeds = [s.tokens / s.seconds if s.seconds > 0 else math.nan for s in story.steps]
    upper.plot(numbers, speeds, color=TRAIN, linewidth=1.2)
    upper.set_ylim(bottom=0)
    prepare(lower, "memory (GiB)", "step")
    lower.plot(numbers, [s.memory_bytes / 2**30 for s in story.steps], color=SECOND, linewidth=1.6)
    lower.set_ylim(bottom=0)


def _two(figure: Figure) -> tuple[Axes, Axes]:
    upper, lower = figure.subplots(2, 1, sharex=True)
    return upper, lower


def finite(values: Sequence[float]) -> list[float]:
    """``values`` with a gap where one is not finite."""
    return [v if math.isfinite(v) else math.nan for v in values]


def _inline(svg: str, name: str) -> str:
    """The ``<svg>`` element alone, its ids made the plot's own, without metadata."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    # A style element would hold for the whole page; what it says is inherited from here as well.
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    # Without its size in points the drawing takes the page's width; the viewBox keeps the shape.
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (?:width|height)="[^"]*"', "", opening)
    return f'{opening} style="stroke-linejoin: round; stroke-linecap: butt">{rest}'
