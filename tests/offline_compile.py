"""Compile kernels, as their launchers launch them, for GPUs that are not here.

Tensors lie on the CPU: a launch is stopped before it runs. Triton's interpreter has to be off.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class Absent:
    """The driver of a GPU that is not here; its number is its capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


_compiled: list[Any] = []


def compile_for(capability: int) -> None:
    """From now on launches are compiled for a GPU of this compute capability, and not run."""
    JITFunction.__getitem__ = _compile_only
    driver.set_active(Absent(capability))
    _compiled.clear()


def compiled() -> Iterable[Any]:
    """The kernels compiled since, each variant once."""
    return {kernel.hash: kernel for kernel in _compiled}.values()


def _compile_only(kernel: JITFunction[Any], grid: Any) -> Any:
    def launch(*args: Any, **kwargs: Any) -> None:
        _compiled.append(kernel.run(*args, grid=grid, warmup=True, **kwargs))

    return launch
