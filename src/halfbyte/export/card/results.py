"""What was measured of a run, for its model card: held-out losses, and what an evaluation found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.evaluate.figure_text import GROUPS, interval_text
from halfbyte.evaluate.results import Results, read_results
from halfbyte.events.types import Evaluated, Kept
from halfbyte.export.card.text import escape, hub_name, public_name, table
from halfbyte.recipe import Recipe

_MODELS = {"base": "base", "quantized base": "base in 4 bits", "adapter": "adapter"}


def held_out_losses(evaluations: Sequence[Evaluated], kept: Kept | None) -> dict[str, Evaluated]:
    """The loss of the base, of the base in 4 bits and of the adapter that was kept."""
    last = {e.what: e for e in evaluations}
    if kept is not None and kept.held_out_loss is not None:
        of_kept = [e for e in evaluations if e.what == "adapter" and e.step == kept.step]
        last.update({"adapter": of_kept[-1]} if of_kept else {})
    return {what: last[what] for what in _MODELS if what in last}


def loss_lines(losses: dict[str, Evaluated]) -> list[str]:
    """The losses as a table; nothing where none was measured."""
    if not losses:
        return []
    rows = next(iter(losses.values())).rows
    return [
        f"Loss on {rows:,} held-out rows (nats per token that carries loss; lower is better):",
        "",
        *table(("model", "loss"), [(_MODELS[what], f"{e.loss:.4f}") for what, e in losses.items()]),
    ]


def model_index(
    title: str, recipe: Recipe, losses: dict[str, Evaluated]
) -> list[dict[str, Any]] | None:
    """The adapter's loss as the hub's metadata has results; None where there is none."""
    found = losses.get("adapter")
    if found is None or not math.isfinite(found.loss):
        return None
    source = recipe.data.all_sources[0].path
    dataset = {
        "name": ", ".join(public_name(s.path) for s in recipe.data.all_sources),
        "type": hub_name(source) or "local",
        "split": f"{found.rows} held-out rows",
    }
    loss = {"type": "loss", "name": "held-out loss", "value": round(found.loss, 6)}
    return [
        {
            "name": title,
            "results": [
                {
                    "task": {"type": "text-generation", "name": "Text generation"},
                    "dataset": dataset,
                    "metrics": [loss],
                }
            ],
        }
    ]


def evaluation_lines(run: Path) -> list[str]:
    """What ``halfbyte evaluate`` found of the run in this folder; nothing where it did not look,
    or where its results cannot be read."""
    found = read_results(run)
    if not isinstance(found, Results):
        return []
    about = found.about
    lines = [
        f"Judged on {escape(str(about.get('rows')))} rows of "
        f"{escape(public_name(str(about.get('data'))))} that did not train, against the base in 4 "
        "bits without the adapter; in brackets are 95 % intervals:",
        "",
    ]
    for group, title in GROUPS.items():
        rows = [
            (
                escape(figure.name),
                escape(interval_text(figure, figure.base)),
                escape(interval_text(figure, figure.adapter)),
                escape(figure.chance.words),
            )
            for figure in found.figures
            if figure.group == group
        ]
        if rows:
            lines += table((escape(title), "base", "adapter", "by chance?"), rows)
    return lines
