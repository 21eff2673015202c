"""How long the GPU is busy: what is left of a profile once gaps are taken out."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# What occupies the GPU, by the names that PyTorch's trace gives it.
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


def union_length(intervals: Iterable[tuple[float, float]]) -> float:
    """The length that the (start, length) ``intervals`` cover together."""
    total, covered_to = 0.0, float("-inf")
    for start, length in sorted(intervals):
        end = start + length
        if end > covered_to:
            total += end - max(start, covered_to)
            covered_to = end
    return total


def read_trace(path: Path, steps: int) -> dict[str, float]:
    """Of a Chrome trace over ``steps`` steps, each by the step: busy milliseconds, kernels, and
    the milliseconds from the first one's begin to the last one's end."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    found = [e for e in events if e.get("ph") == "X" and e.get("cat") in ON_DEVICE]
    if not found:
        raise RuntimeError("the profile holds no kernel")
    span_us = max(e["ts"] + e["dur"] for e in found) - min(e["ts"] for e in found)
    busy_us = union_length((float(e["ts"]), float(e["dur"])) for e in found)
    return {
        "gpu_busy_ms": busy_us / 1e3 / steps,
        "kernels": sum(e["cat"] == "kernel" for e in found) / steps,
        "span_ms": span_us / 1e3 / steps,
    }


def for_steps_made(profile: dict[str, float], steps: int, ms: float) -> dict[str, float]:
    """``profile`` by the step that was really made, where it was taken for ``steps``.

    Where losses are read late and several at once, more steps may have been made between the
    events of two steps than lie between their numbers; ``ms`` is what a step takes.
    """
    made = profile["span_ms"] * steps / ms
    if abs(made / steps - 1) < 0.2:  # profiled, a step takes a little longer
        return profile
    return {name: value * steps / max(1, round(made)) for name, value in profile.items()}


class KernelProfile:
    """A profile of the device alone: recording the host as well would slow the host down."""

    def __init__(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._profile: Any = profile(activities=[ProfilerActivity.CUDA])

    def start(self) -> None:
        import torch

        torch.cuda.synchronize()
        self._profile.start()

    def stop(self, steps: int) -> dict[str, float]:
        """The figures of ``read_trace`` since ``start``, over ``steps`` steps."""
        import torch

        torch.cuda.synchronize()
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            return read_trace(path, steps)
