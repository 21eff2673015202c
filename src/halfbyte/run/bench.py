"""What a training step costs on this machine, and what its hardware could do: ``halfbyte bench``.

``measure`` returns one JSON object, of plain values:

- ``halfbyte``, ``date``: the version, and the day (ISO).
- ``device``: ``kind``, ``name``, ``capability``, ``memory_bytes``, ``cpu``, ``threads``, ``cuda``,
  ``driver``, ``platform``, ``python``. ``packages``: versions by name.
- ``precision``: the number format of the products, chosen for the device.
- ``ceilings``: ``copy_bytes_per_s`` (bytes read and written by a large copy on the device) and
  ``product_flop_per_s`` (2n³ a product of n × n matrices in ``precision``; ``product_size`` is n).
- ``workload``: ``name``, ``parameters``, ``rows``, ``batch_size``, ``warmup``, ``steps`` (timed),
  ``tokens_per_step``, ``labels_per_step``.
- ``tools``: for ``halfbyte``, and ``trl`` where peers are asked for, ``ms_per_step`` (median),
  ``tokens_per_s``, ``peak_bytes`` (PyTorch's peak on a GPU, the process's on a CPU), ``ready_s``
  (from the call to the first step), ``loss_first`` and ``loss_last``; or ``error``, a sentence.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

import halfbyte
from halfbyte.errors import RunError
from halfbyte.events.types import Event, ModelLoaded, Step, TrainingStarted
from halfbyte.plan.device import environment_event, find_device
from halfbyte.plan.precision import choose_precision
from halfbyte.recipe import Recipe
from halfbyte.run.assembly import assemble
from halfbyte.run.bench_workload import ON_CPU, ON_GPU, Workload, make_workload
from halfbyte.run.precision import DTYPES
from halfbyte.run.record import RunRecord
from halfbyte.run.training import train

PEER_PACKAGES = ("trl", "peft", "bitsandbytes")
PEER_TIMEOUT_S = 1800


def measure(
    *,
    steps: int | None = None,
    peers: bool = False,
    workload: Workload | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure this machine; the object is described above.

    ``steps`` are timed in place of the workload's own number; ``tell`` is told what is being done.
    Raises RunError where there is no room for the model on the disk.
    """
    device = find_device("auto")
    workload = workload or (ON_GPU if device.kind == "cuda" else ON_CPU)
    workload = replace(workload, steps=steps or workload.steps)
    precision, _ = choose_precision(device)
    tell("what the hardware can do")
    ceilings = measure_ceilings(device.kind, DTYPES[precision])
    with tempfile.TemporaryDirectory(prefix="halfbyte-bench-") as name:
        folder = Path(name)
        tell("a model with random weights")
        try:
            recipe = make_workload(folder, workload, device.kind)
        except OSError as error:
            raise RunError(
                f"the model to measure with cannot be written to {folder.parent} "
                f"({error.strerror or error}); set TMPDIR to a folder with 3 GB of room."
            ) from error
        recipe = recipe.model_copy(update={"precision": precision})
        if device.kind == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        tell("halfbyte's step")
        facts, own = _time_halfbyte(recipe, folder, workload)
        tools = {"halfbyte": own}
        if peers:
            tell("TRL's step")
            tools["trl"] = _time_trl(recipe, folder, workload, device.kind)
    environment = asdict(environment_event(device))
    packages = environment.pop("packages")
    return {
        "halfbyte": halfbyte.__version__,
        "date": date.today().isoformat(),
        "device": {
            "kind": device.kind,
            "name": device.name,
            "capability": environment["gpu_capability"],
            "memory_bytes": device.memory_bytes,
            **{key: environment[key] for key in ("cpu", "cuda", "driver", "platform", "python")},
            "threads": device.threads,
        },
        "packages": packages,
        "precision": precision,
        "ceilings": ceilings,
        "workload": {
            "name": workload.name,
            "rows": workload.rows,
            "batch_size": workload.batch_size,
            "warmup": workload.warmup,
            "steps": workload.steps,
            **facts,
        },
        "tools": tools,
    }


def measure_ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Bandwidth of a large copy and rate of a large product on ``device``: the best of several."""
    on_gpu = device == "cuda"
    size, count = (8192, 1 << 30) if on_gpu else (1024, 1 << 26)
    if on_gpu and torch.cuda.mem_get_info()[0] < 4 << 30:
        size, count = 4096, 1 << 28
    source = torch.empty(count, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy_s = _fastest(partial(target.copy_, source), on_gpu)
    del source, target
    # Not zeros: a GPU multiplies those faster.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    product_s = _fastest(partial(torch.mm, a, b, out=out), on_gpu)
    return {
        "copy_bytes_per_s": 2 * count / copy_s,
        "product_flop_per_s": 2 * size**3 / product_s,
        "product_size": size,
    }


def _fastest(work: Callable[[], Any], on_gpu: bool) -> float:
    """Seconds of the fastest of several calls, by the device's own clock on a GPU."""
    seconds = []
    for _ in range(20 if on_gpu else 5):
        if on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
    return min(seconds)


class _EnoughSteps(Exception):
    """Raised out of a listener: what follows the steps of a run is not measured."""


def _time_halfbyte(
    recipe: Recipe, folder: Path, workload: Workload
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Facts of the work done, and halfbyte's figures."""
    done: list[Step] = []
    facts: dict[str, Any] = {}
    began = time.perf_counter()
    ready = began

    def listen(event: Event) -> None:
        nonlocal ready
        match event:
            case ModelLoaded():
                facts["parameters"] = event.parameters_base + event.parameters_trainable
            case TrainingStarted():
                ready = time.perf_counter()
            case Step():
                done.append(event)
                if len(done) == workload.warmup + workload.steps:
                    raise _EnoughSteps

    with suppress(_EnoughSteps):
        train(recipe, out=folder / "run", runs=folder, listeners=[listen])
    if len(done) < workload.warmup + workload.steps:  # Ctrl-C ended the run after its step
        raise KeyboardInterrupt
    timed = done[workload.warmup :]
    facts["tokens_per_step"] = sum(step.tokens for step in timed) / len(timed)
    facts["labels_per_step"] = sum(step.labels for step in timed) / len(timed)
    return facts, figures(
        seconds=[step.seconds for step in timed],
        tokens=sum(step.tokens for step in timed),
        losses=[step.loss for step in done],
        ready_s=ready - began,
    )


def figures(
    *, seconds: list[float], tokens: int, losses: list[float], ready_s: float
) -> dict[str, Any]:
    """A tool's entry in ``tools``, made in the process that did the steps."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource  # which Windows does not have

        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "ms_per_step": median(seconds) * 1e3,
        "tokens_per_s": tokens / sum(seconds),
        "peak_bytes": int(peak),
        "ready_s": ready_s,
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }


def _time_trl(recipe: Recipe, folder: Path, workload: Workload, device: str) -> dict[str, Any]:
    """TRL's figures over the same rows in the same order, from a process of its own."""
    missing = [package for package in PEER_PACKAGES if find_spec(package) is None]
    if missing:
        names = ", ".join(missing)
        return {"error": f"not installed: {names} (pip install 'halfbyte[test]' brings them)"}
    batches = assemble(recipe, RunRecord(), tell=False).batches
    rows = []
    for number in range(1, workload.warmup + workload.steps + 1):
        for batch in batches.step(number):
            borders = batch.cu_seqlens.tolist()
            ids = batch.input_ids.tolist()
            rows += [ids[a:b] for a, b in pairwise(borders) if b > a]
    spec = {
        "model": recipe.model.name,
        "rows": rows,
        "batch_size": workload.batch_size,
        "warmup": workload.warmup,
        "steps": workload.steps,
        "precision": recipe.precision,
        "device": device,
        "out": str(folder / "trl"),
    }
    path = folder / "trl.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    if device == "cuda":
        torch.cuda.empty_cache()
    command = [sys.executable, "-P", "-m", "halfbyte.run.bench_trl", str(path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment,
            timeout=PEER_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"TRL was not done after {PEER_TIMEOUT_S // 60} minutes"}
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": f"TRL failed: {said[-1] if said else f'exit code {done.returncode}'}"}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))
