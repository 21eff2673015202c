"""What was measured of a run, for its model card: held-out losses, and what an evaluation found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.events.types import Evaluated, Kept
from halfbyte.export.card_text import escape, hub_name, public_name, table
from halfbyte.foreign_json import read_json
from halfbyte.recipe import Recipe

EVALUATION = Path("evaluation") / "results.json"  # in a run folder
_MOST_ROWS = 30


def held_out_losses(evaluations: Sequence[Evaluated], kept: Kept | None) -> dict[str, Evaluated]:
    """The loss of the base, of the base in 4 bits and of the adapter that was kept."""
    last = {e.what: e for e in evaluations}
    if kept is not None and kept.held_out_loss is not None:
        of_kept = [e for e in evaluations if e.what == "adapter" and e.step == kept.step]
        last.update({"adapter": of_kept[-1]} if of_kept else {})
    return {what: last[what] for what in ("base", "quantized base", "adapter") if what in last}


def loss_lines(losses: dict[str, Evaluated]) -> list[str]:
    """The losses as a table; nothing where none was measured."""
    if not losses:
        return []
    rows = next(iter(losses.values())).rows
    return [
        f"Loss on {rows:,} held-out rows (nats per token that carries loss; lower is better):",
        "",
        *table(("model", "loss"), [(what, f"{e.loss:.4f}") for what, e in losses.items()]),
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
    """What ``halfbyte evaluate`` found of the run in this folder; nothing where it did not look.

    The file is read as one that somebody else wrote: what is no figure is passed over.
    """
    try:
        found = read_json(run / EVALUATION)
    except (OSError, ValueError):
        return []
    rows = _figures(found)
    if not rows:
        return []
    return [
        "By `halfbyte evaluate`, on held-out rows (in brackets 95 % of the bootstrap):",
        "",
        *table(("figure", "base in 4 bits", "adapter"), rows),
    ]


def _figures(found: Any) -> list[tuple[str, str, str]]:
    figures = found.get("figures") if isinstance(found, dict) else None
    if isinstance(figures, dict):
        named = list(figures.items())
    elif isinstance(figures, list):
        named = [(f.get("name"), f) for f in figures if isinstance(f, dict)]
    else:
        return []
    rows = []
    for name, figure in named[:_MOST_ROWS]:
        if not isinstance(name, str) or not isinstance(figure, dict):
            continue
        base, adapter = _figure(figure.get("base")), _figure(figure.get("adapter"))
        if adapter:
            rows.append((escape(name), base or "–", adapter))
    return rows


def _figure(found: Any) -> str | None:
    """A value with its interval, as ``{"value": …, "low": …, "high": …}`` or a plain number."""
    if isinstance(found, dict):
        value = _number(found.get("value"))
        low, high = _number(found.get("low")), _number(found.get("high"))
        if value is None or low is None or high is None:
            return value
        return f"{value} [{low}, {high}]"
    return _number(found)


def _number(found: Any) -> str | None:
    is_one = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    return f"{found:.4g}" if is_one else None
