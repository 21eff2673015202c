"""Energy of the steps, where the machine reports it."""

from __future__ import annotations

from pathlib import Path

from halfbyte.events.types import Energy

_RAPL = Path("/sys/class/powercap")


class EnergyMeter:
    """Reads a counter at its making and at ``read``; None where there is none to read.

    A GPU's counter is NVML's total energy (mJ); a CPU's is Linux's powercap (µJ of each package,
    readable on few systems, wrapping at ``max_energy_range_uj``).
    """

    def __init__(self, device: str) -> None:
        self._gpu = _nvml_handle() if device == "cuda" else None
        self._packages = [] if device == "cuda" else _readable_packages()
        self._start = self._counters()

    def read(self) -> Energy | None:
        """Joules since the meter was made."""
        now = self._counters()
        if not now:
            return None
        if self._gpu is not None:
            return Energy((now[0] - self._start[0]) / 1e3, "NVML, the whole GPU")
        used = 0
        for package, start, end in zip(self._packages, self._start, now, strict=True):
            wrap = int((package / "max_energy_range_uj").read_text())
            used += (end - start) % wrap
        return Energy(used / 1e6, "powercap, the CPU packages")

    def _counters(self) -> list[int]:
        if self._gpu is not None:
            import pynvml

            return [pynvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)]
        return [int((package / "energy_uj").read_text()) for package in self._packages]


def _nvml_handle() -> object | None:
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no pynvml, no driver, or a GPU before Volta: there is nothing to report
        return None
    return handle


def _readable_packages() -> list[Path]:
    found = []
    for package in sorted(_RAPL.glob("intel-rapl:?")):
        try:
            int((package / "energy_uj").read_text())
            found.append(package)
        except (OSError, ValueError):
            continue
    return found
