"""The device that trains, and what of this machine belongs into a run's record."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from halfbyte.errors import DeviceError
from halfbyte.events.types import Environment
from halfbyte.plan.machine import (
    NVIDIA_DRIVER,
    memory_limit,
    read_processor,
    read_text,
    usable_threads,
)

# Compute capability from which a GPU multiplies bf16 itself (Ampere); a T4 has 7.5.
BF16_CAPABILITY = (8, 0)

# Environment variable that makes a larger GPU stand in for one that is not at hand: its number
# formats, its kernels and its memory, not its speed. "t4" is the one value.
PROXY = "HALFBYTE_PROXY"
T4_BYTES = int(14.5 * 2**30)

PACKAGES = (
    *("halfbyte", "torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy"),
)


@dataclass(frozen=True)
class Device:
    """Where training happens.

    ``memory_bytes`` is all memory that the device has (or a container may use), ``free_bytes``
    what of it is free now; ``capability`` a GPU's compute capability; ``bf16_native`` whether it
    multiplies bf16 itself; ``threads`` the CPU threads that may run at once.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    memory_bytes: int
    free_bytes: int
    capability: tuple[int, int] | None
    bf16_native: bool
    threads: int


def find_device(asked: Literal["auto", "cpu", "cuda"] | str = "auto") -> Device:
    """The device that ``asked`` means on this machine; auto is the GPU where there is one.

    Raises DeviceError where a GPU is asked for and PyTorch can use none.
    """
    if asked != "cpu":
        import torch

        if torch.cuda.is_available():
            return _gpu(torch)
        if asked == "cuda":
            raise DeviceError(_no_gpu(torch.version.cuda, read_text(NVIDIA_DRIVER)))
    return _cpu()


def _gpu(torch: Any) -> Device:
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    capability = (int(properties.major), int(properties.minor))
    free, total = torch.cuda.mem_get_info(index)
    name = str(properties.name)
    if os.environ.get(PROXY) == "t4":
        name, capability = f"{name} in place of a T4", (7, 5)
        torch.cuda.set_per_process_memory_fraction(min(1.0, T4_BYTES / total), index)
        free, total = min(free, T4_BYTES), min(total, T4_BYTES)
    return Device(
        kind="cuda",
        name=name,
        memory_bytes=int(total),
        free_bytes=int(free),
        capability=capability,
        bf16_native=capability >= BF16_CAPABILITY,
        threads=usable_threads(),
    )


def _cpu() -> Device:
    total, free = cpu_memory()
    processor = read_processor()
    return Device(
        kind="cpu",
        name=processor.name,
        memory_bytes=total,
        free_bytes=free,
        capability=None,
        bf16_native=processor.bf16_native,
        threads=usable_threads(),
    )


def cpu_memory() -> tuple[int, int]:
    """(all, free) bytes of main memory that this process may use."""
    import psutil

    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    limited = memory_limit()
    if limited is not None:
        limit, used = limited
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def _no_gpu(cuda_build: str | None, driver: str) -> str:
    if cuda_build is None and driver:
        why = (
            "there is an NVIDIA driver, but this PyTorch is built for the CPU; install a CUDA build"
        )
    elif driver:
        why = (
            f"this PyTorch is built for CUDA {cuda_build} and cannot use the driver "
            f"{_driver_in(driver) or 'here'}; halfbyte doctor says more"
        )
    else:
        why = "no NVIDIA driver was found"
    return f"device is cuda, but there is no GPU to use: {why} (--set device=auto takes the CPU)."


def environment_event(device: Device) -> Environment:
    """The machine and the software of a run on ``device``."""
    on_gpu = device.kind == "cuda"
    return Environment(
        platform=platform.platform(),
        python=platform.python_version(),
        cpu=read_processor().name,
        cpu_threads=device.threads,
        memory_bytes=cpu_memory()[0],
        device=device.kind,
        gpu=device.name if on_gpu else None,
        gpu_memory_bytes=device.memory_bytes if on_gpu else None,
        gpu_capability=".".join(map(str, device.capability)) if device.capability else None,
        cuda=_cuda_version() if on_gpu else None,
        driver=driver_version() if on_gpu else None,
        packages=_versions(),
    )


def driver_version() -> str | None:
    """The NVIDIA driver's version, from NVML or from the kernel module; None without one."""
    try:
        import pynvml

        pynvml.nvmlInit()
        found = pynvml.nvmlSystemGetDriverVersion()
        return found.decode() if isinstance(found, bytes) else str(found)
    except Exception:  # no pynvml, or no driver behind it
        return _driver_in(read_text(NVIDIA_DRIVER))


def _driver_in(text: str) -> str | None:
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else None


def _cuda_version() -> str | None:
    import torch

    return str(torch.version.cuda) if torch.version.cuda else None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
