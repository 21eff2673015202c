"""The device memory of another process over its whole life, as the driver counts it.

PyTorch knows only what its own allocator took. The driver counts the CUDA context, libraries'
workspaces and graphs as well, alike for every tool; of that the context is taken off, which a
process that does nothing else has too.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

INTERVAL_S = 0.02


class Driver:
    """NVML, or nvidia-smi where its Python package is missing; device 0."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._device: Any = None
        with suppress(Exception):  # no package, or no driver behind it
            import pynvml

            pynvml.nvmlInit()
            self._device = pynvml.nvmlDeviceGetHandleByIndex(0)
            self._nvml = pynvml

    @property
    def name(self) -> str:
        return "NVML" if self._nvml else "nvidia-smi"

    def used(self) -> int | None:
        """Bytes in use on the device, by whomever."""
        if self._nvml:
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._device).used)
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i0"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
            return int(done.stdout.split()[0]) << 20
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            return None

    def used_by(self, pids: set[int]) -> int | None:
        """Bytes in use by the processes ``pids``; None where the driver does not tell.

        In a container the driver may know processes by other numbers, or by none.
        """
        if not self._nvml:
            return None
        try:
            running = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._device)
        except self._nvml.NVMLError:
            return None
        ours = [p.usedGpuMemory for p in running if p.pid in pids]
        return sum(ours) if ours and None not in ours else None


class MemorySampler:
    """Samples what ``pid`` and its children use until ``stop``, keeping the maxima.

    ``frozen`` ends the sampling earlier: a profiler's own buffers are no part of training.
    ``baseline`` is what was used on the device before the process began.
    """

    def __init__(
        self, driver: Driver, pid: int, baseline: int | None, frozen: Callable[[], bool]
    ) -> None:
        self._driver, self._pid, self._baseline, self._frozen = driver, pid, baseline, frozen
        self._process: int | None = None
        self._device: int | None = None
        self._samples = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> dict[str, Any]:
        """The maxima: ``process`` by the driver's list, ``device`` as the rise of the whole."""
        self._stop.set()
        self._thread.join()
        rise = None
        if self._device is not None and self._baseline is not None:
            rise = max(0, self._device - self._baseline)
        return {
            "process_bytes": self._process,
            "device_bytes": rise,
            "samples": self._samples,
            "driver": self._driver.name,
        }

    def _run(self) -> None:
        while not self._stop.is_set() and not self._frozen():
            used = self._driver.used()
            if used is not None:
                self._device = max(used, self._device or 0)
            own = self._driver.used_by({self._pid, *children_of(self._pid)})
            if own is not None:
                self._process = max(own, self._process or 0)
            self._samples += 1
            self._stop.wait(INTERVAL_S)


def children_of(pid: int) -> list[int]:
    """Process numbers of the children of ``pid``, and of theirs."""
    found = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            text = Path(f"/proc/{pid}/task/{task}/children").read_text()
            found += [int(word) for word in text.split()]
    except OSError:
        return found
    for child in list(found):
        found += children_of(child)
    return found


def peak_bytes(memory: dict[str, Any], context: dict[str, Any]) -> int | None:
    """What a process took at its peak, less the context; both as ``MemorySampler.stop`` gives them.

    The same count is used for all: the driver's list of processes where that knew the process
    that only makes a context, else the rise of the whole device. ``context`` also says what its
    process had reserved for a tensor (``reserved_bytes``), which is no context.
    """
    count = "process_bytes" if context.get("process_bytes") is not None else "device_bytes"
    if memory.get(count) is None or context.get(count) is None:
        return None
    own = context[count] - context.get("reserved_bytes", 0)
    return max(0, int(memory[count]) - int(own))
