"""The bar of a running training, below the logged lines of a terminal."""

from __future__ import annotations

import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from halfbyte.cli.meter import Meter
from halfbyte.cli.units import bytes_text, duration_text, hour_text, rate_text

REFRESHES_A_SECOND = 4


class Bar:
    """Two lines that show where the training stands; gone once it is stopped."""

    def __init__(self, console: Console, meter: Meter) -> None:
        self.meter = meter
        self.stopping = False
        self._live = Live(
            console=console,
            get_renderable=self._render,
            refresh_per_second=REFRESHES_A_SECOND,
            transient=True,
        )

    def start(self) -> None:
        self._live.start(refresh=True)

    def stop(self) -> None:
        self._live.stop()

    def _render(self) -> RenderableType:
        steps, done = self.meter.started.steps, self.meter.done
        top = Table.grid(padding=(0, 1, 0, 0), expand=True)
        top.add_column(no_wrap=True)
        top.add_column(ratio=1)
        top.add_column(no_wrap=True)
        top.add_row(
            f"step {done:,}/{steps:,}",
            ProgressBar(total=steps, completed=done, complete_style="cyan"),
            self._time_left(),
        )
        return Group(top, Text(self._figures()))

    def _time_left(self) -> str:
        left = self.meter.seconds_left
        if left is None:
            return "measuring"
        if left <= 0:
            return "all steps done"
        return f"{duration_text(left)} left, ends {hour_text(time.time() + left)}"

    def _figures(self) -> str:
        if self.stopping:
            return "finishing this step, then saving a checkpoint; Ctrl-C again stops at once"
        step = self.meter.last
        if step is None:
            return "held-out loss, then the first step …"
        return " · ".join(
            [
                f"loss {step.loss:.3f}, smoothed {self.meter.smoothed:.3f}",
                f"rate {step.learning_rate:.2e}",
                rate_text(self.meter.tokens_per_second),
                bytes_text(step.memory_bytes),
            ]
        )
