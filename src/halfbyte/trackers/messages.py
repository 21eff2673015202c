"""What trackers are told: an event as metrics, a text or an end, in plain values."""

from __future__ import annotations

import re
from typing import Any

from halfbyte.events.types import (
    Diverged,
    Evaluated,
    Event,
    Fallback,
    Finished,
    Interrupted,
    Noticed,
    RolledBack,
    Step,
    Warned,
)

FINISHED, INTERRUPTED, DIVERGED, FAILED = "finished", "interrupted", "diverged", "failed"

Message = dict[str, Any]


def message_of(event: Event, time: float) -> Message | None:
    """What to say of ``event``, which happened at ``time`` (unix seconds); None for nothing.

    Names of metrics follow what other trainers log: ``train/loss``, ``eval/loss``.
    """
    match event:
        case Step(left_out=True):
            return None  # nothing was computed
        case Step():
            metrics = {
                "train/loss": event.loss,
                "train/learning_rate": event.learning_rate,
                "train/grad_norm": event.grad_norm,
                "train/epoch": event.epoch,
                "train/memory_gib": event.memory_bytes / 2**30,
            }
            if event.seconds > 0:
                metrics["train/tokens_per_second"] = event.tokens / event.seconds
            return {"kind": "metrics", "step": event.step, "time": time, "metrics": metrics}
        case Evaluated():
            metrics = {_evaluated(event.what): event.loss}
            return {"kind": "metrics", "step": event.step, "time": time, "metrics": metrics}
        case Warned():
            return {"kind": "text", "step": event.step or 0, "time": time, "text": event.text}
        case Noticed():
            return {"kind": "text", "step": event.step, "time": time, "text": event.sentence}
        case Fallback():
            text = f"{event.what}: {event.reason}"
            return {"kind": "text", "step": 0, "time": time, "text": text}
        case RolledBack():
            return {"kind": "back", "step": event.to, "time": time}
        case _:
            return None


def ends(event: Event) -> tuple[str, str] | None:
    """The outcome that ``event`` is, and its reason; None where the run goes on."""
    match event:
        case Finished():
            return FINISHED, ""
        case Interrupted():
            return INTERRUPTED, event.signal
        case Diverged():
            return DIVERGED, event.reason
        case _:
            return None


def _evaluated(what: str) -> str:
    if what == "adapter":
        return "eval/loss"
    return f"eval/{re.sub(r'[^a-z0-9]+', '_', what.lower())}_loss"
