"""How a run makes its steps, written down: ``strategy.json`` in its folder.

Nothing in it is a setting, and none of it changes what is computed; but sums are made in another
order by another kernel or in a batch of another shape, and what was found by measuring may be found
otherwise the next time. A run that goes on therefore does as it is written there. Where the machine
or the software is another one by then, all of it is decided anew.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from halfbyte.data.batch import Bucket
from halfbyte.foreign_json import read_json
from halfbyte.kernels.choice import ALL, ELEMENTWISE, PLAIN, Kernels
from halfbyte.plan.device import Device
from halfbyte.run.fingerprint import package_versions
from halfbyte.run.folder import write_whole

FILE_NAME = "strategy.json"


@dataclass(frozen=True)
class Strategy:
    """What was decided when the run began.

    ``kernels`` names the implementation of each kernel, attention among them, ``products`` the
    library of each large product, by shape. ``buckets`` is None where batches have any shape.
    """

    device: str
    versions: dict[str, str]
    recomputed_layers: int
    copied_layers: int
    kernels: dict[str, str]
    products: dict[str, str]
    buckets: list[Bucket] | None
    captured: bool
    deterministic: bool

    def why_not_here(self, device: Device) -> str | None:
        """What is another now than when the run began; None where nothing is."""
        if device.name != self.device:
            return f"this run began on {self.device} and goes on on {device.name}"
        now = versions_here()
        names = sorted(self.versions.keys() | now.keys())
        for name in [n for n in names if device.kind == "cpu" or not n.startswith("CPU ")]:
            was, is_now = self.versions.get(name, "absent"), now.get(name, "absent")
            if was != is_now:
                return f"this run began with {name} {was} and goes on with {is_now}"
        if kernels_named(self.kernels) is None:
            return "this run began with kernels that are not there any more"
        return None

    def write(self, folder: Path) -> None:
        write_whole(folder / FILE_NAME, json.dumps(asdict(self), indent=1) + "\n")


def read_strategy(folder: Path) -> Strategy | None:
    """The strategy of the run in ``folder``; None where none can be read."""
    try:
        return TypeAdapter(Strategy).validate_python(read_json(folder / FILE_NAME))
    except (OSError, ValueError, TypeError):  # what pydantic raises is a ValueError
        return None


def versions_here() -> dict[str, str]:
    """Versions of what decides which kernels there are and what they do."""
    found = dict(package_versions())
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    # On a CPU the kernels of PyTorch that run, and how a sum is shared among its threads.
    found["CPU instructions"] = torch.backends.cpu.get_cpu_capability()
    found["CPU threads"] = str(torch.get_num_threads())
    return found


def kernel_names(kernels: Kernels) -> dict[str, str]:
    """The module and function of each kernel, as ``strategy.json`` has them."""
    return {field.name: _name(getattr(kernels, field.name)) for field in fields(kernels)}


def kernels_named(names: dict[str, str]) -> Kernels | None:
    """The kernels of those names; None where one of them is not known."""
    found = {}
    for field in fields(Kernels):
        known = [getattr(kernels, field.name) for kernels in (ALL, ELEMENTWISE, PLAIN)]
        named = [kernel for kernel in known if _name(kernel) == names.get(field.name)]
        if not named:
            return None
        found[field.name] = named[0]
    return Kernels(**found)


def _name(kernel: Any) -> str:
    if isinstance(kernel, partial):
        inner = ", ".join(f"{key}={_name(value)}" for key, value in kernel.keywords.items())
        return f"{_name(kernel.func)}({inner})"
    if callable(kernel):
        return f"{kernel.__module__.removeprefix('halfbyte.')}.{kernel.__qualname__}"
    return str(kernel)
