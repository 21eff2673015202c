"""One process of halfbyte: timed steps of the TinyLlama recipe, or some of them profiled.

    python -m peers.run_halfbyte SPEC

SPEC is JSON, from ``cases.Measurement.spec`` and more. The run is ended once its steps are done:
what follows them (saving, the report) the peers do not do. One JSON line is printed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from peers.kernel_time import KernelProfile, for_steps_made

STARTED = time.perf_counter()


class EnoughSteps(Exception):
    """Raised out of a listener to end the run."""


class Listener:
    """Notes steps and phases; profiles a window of steps where it is asked to.

    A loss may be read some steps after its step was made. The window still spans as many steps
    as there are between its two events, since the device is waited for at both ends.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.steps: list[Any] = []
        self.heard: list[float] = []
        self.phases: dict[str, float] = {}
        self.said: list[str] = []
        self.first_step_s: float | None = None
        self.profile: dict[str, float] = {}
        self._last = spec["warmup"] + spec["steps"]
        self._window = (
            (self._last, self._last + spec["profiled_steps"]) if spec["profile"] else None
        )
        self._mark = Path(spec["mark"])
        self._profiler: Any = None

    def __call__(self, event: Any) -> None:
        if event.kind == "phase":
            self.phases[event.name] = round(event.seconds, 3)
        elif event.kind == "fallback":
            self.said.append(f"fallback: {event.what}: {event.reason}")
        elif event.kind == "warning":
            self.said.append(f"warning: {event.text}")
        elif event.kind == "training_started":
            self.first_step_s = time.perf_counter() - STARTED
        elif event.kind == "step":
            self._step(event)

    def _step(self, event: Any) -> None:
        if self._window is None or event.step <= self._window[0]:
            self.steps.append(event)
            self.heard.append(time.perf_counter())
        if self._window is None:
            if event.step >= self._last:
                self._mark.touch()
                raise EnoughSteps
            return
        if event.step == self._window[0]:
            self._mark.touch()
            self._profiler = KernelProfile()
            self._profiler.start()
        elif event.step == self._window[1]:
            self.profile = self._profiler.stop(self._window[1] - self._window[0])
            raise EnoughSteps


def make_recipe(spec: dict[str, Any]) -> tuple[Any, float | None]:
    """The recipe of ``spec``, and the memory limit in GB that it states, if any."""
    from halfbyte import Recipe
    from halfbyte.errors import RecipeError
    from peers.prepare import RECIPE, overrides

    work = Path(spec["work"])
    changes = [
        *overrides(Path(spec["data"]), work / "model", spec["rows"], spec["batch"]),
        f"lora.lora_dropout={spec['dropout']}",
        f"training.gradient_checkpointing={'true' if spec['tight'] else 'false'}",
        f"precision={'fp16' if spec['fp16'] else 'bf16'}",
    ]
    limit = spec.get("memory_limit_gb")
    if limit is not None:
        try:
            return Recipe.load(RECIPE, [*changes, f"memory_limit_gb={limit}"]), limit
        except RecipeError as error:
            if "memory_limit_gb" not in str(error):
                raise
            print(f"no limit is set: {error}", file=sys.stderr)
    return Recipe.load(RECIPE, changes), None


def run(spec: dict[str, Any]) -> dict[str, Any]:
    if spec["fp16"]:
        os.environ["HALFBYTE_PROXY"] = "t4"
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    from halfbyte import train

    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    if spec["profile"]:
        # A graph captured before the profiler's library is loaded is not seen by it.
        with profiling(activities=[ProfilerActivity.CUDA]):
            torch.zeros(1, device="cuda")
    recipe, limit = make_recipe(spec)
    listener = Listener(spec)
    runs = Path(spec["work"]) / "runs"
    out = runs / spec["key"].replace("/", "-")
    with suppress(EnoughSteps):
        train(
            recipe,
            out=out,
            runs=runs,
            max_steps=spec["recipe_steps"],
            overwrite=True,
            listeners=[listener],
        )
    steps = listener.steps
    timed = [s.seconds * 1e3 for s in steps[spec["warmup"] :]]
    heard = listener.heard[spec["warmup"] :]
    profile = listener.profile
    if profile:
        profile = for_steps_made(profile, spec["profiled_steps"], median(timed))
    return {
        "ms": timed,
        # Between the events, as a check of the times that the events hold.
        "ms_wall": (heard[-1] - heard[0]) * 1e3 / (len(heard) - 1) if len(heard) > 1 else None,
        "step_tokens": [s.tokens for s in steps],
        "step_labels": [s.labels for s in steps],
        "losses": [s.loss for s in steps],
        "skipped": sum(s.skipped for s in steps),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "memory_limit_gb": limit,
        "setup_s": listener.first_step_s,
        "tokenize_s": listener.phases.get("tokenize"),
        "load_s": listener.phases.get("quantize"),
        "phases": listener.phases,
        "said": listener.said,
        "gpu": torch.cuda.get_device_name(0),
        "versions": versions(),
        **profile,
    }


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for package in ("halfbyte", "torch", "triton", "transformers", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    result = run(json.loads(sys.argv[1]))
    print(json.dumps(result), flush=True)
