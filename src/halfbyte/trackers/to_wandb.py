"""Weights & Biases, by its own client."""

from __future__ import annotations

import os
from typing import Any


def open_tracker(opening: dict[str, Any]) -> tuple[Wandb, dict[str, Any]]:
    """The run in the project ``target``: a new one, or the one kept before a resume.

    Raises what the client raises, such as for a key that is missing.
    """
    import wandb

    kept = opening["kept"] or {}
    run = wandb.init(
        project=opening["target"],
        name=None if "WANDB_NAME" in os.environ else opening["run"],
        id=kept.get("id"),
        resume="allow",
        dir=os.environ.get("WANDB_DIR") or opening["folder"],
        config=opening["config"],
        settings=wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, save_code=False
        ),
    )
    # Its own count of what is logged never goes back; a run that is resumed or rolled back does.
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return Wandb(run), {"id": run.id, "url": run.url}


class Wandb:
    """Logs into one run."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._warnings: list[str] = []

    def metrics(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._run.log({"step": row["step"], **row["metrics"]})

    def text(self, step: int, time: float, text: str) -> None:
        """The client's place for texts is the summary; its alerts would send mail for each."""
        self._warnings.append(text if not step else f"step {step}: {text}")
        self._run.summary["warnings"] = self._warnings[-100:]

    def back(self, step: int, time: float) -> None:
        """Nothing: the steps done again are logged again, at the same place of the x axis."""

    def end(self, message: dict[str, Any]) -> None:
        self._run.summary["outcome"] = message["outcome"]
        self._run.finish(exit_code=0 if message["outcome"] == "finished" else 1)
