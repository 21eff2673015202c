"""What Linux says of this machine: processor, memory, threads, limits of a container.

Each function takes the texts or folders it reads, so that a test can stand in for another machine.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

# What multiplies bf16 numbers in hardware. AVX2 and AVX-512 without BF16 only emulate it: their
# products run about 8 times slower forward than fp32's and 100 times slower backward.
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True)
class Processor:
    """``name`` as its maker calls it; ``bf16_native`` whether it multiplies bf16 itself."""

    name: str
    bf16_native: bool


def read_processor(cpuinfo: Path = CPUINFO) -> Processor:
    """The first processor of /proc/cpuinfo, x86 or ARM; elsewhere what Python knows."""
    lines = read_text(cpuinfo).splitlines()
    fields: dict[str, str] = {}
    for line in lines:
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), value.strip())
    flags = set(f"{fields.get('flags', '')} {fields.get('features', '')}".lower().split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return Processor(name, bool(flags & _BF16_FLAGS))


def read_text(path: Path) -> str:
    """The file's text, empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def memory_limit(root: Path = CGROUP_ROOT, own: Path = OWN_CGROUP) -> tuple[int, int] | None:
    """The tightest memory limit of our cgroups as (limit, used) bytes; None where there is none.

    The page cache of files that nobody maps does not count as used: it is given back on demand.
    """
    found = []
    for folder in _folders(root, own, "memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            if limit is not None and limit < 1 << 60:  # version 1 writes "no limit" as 2^63
                cache = _stat(folder / "memory.stat", "inactive_file")
                found.append((limit, max(0, (used or 0) - cache)))
    return min(found, key=lambda pair: pair[0] - pair[1], default=None)


def usable_threads(root: Path = CGROUP_ROOT, own: Path = OWN_CGROUP) -> int:
    """Threads that may run at once: the affinity mask, within the container's quota."""
    if hasattr(os, "sched_getaffinity"):
        threads = len(os.sched_getaffinity(0))
    else:
        threads = os.cpu_count() or 1
    for folder in _folders(root, own, "cpu"):
        words = read_text(folder / "cpu.max").split()
        quota = _number(folder / "cpu.cfs_quota_us")
        period = _number(folder / "cpu.cfs_period_us")
        if len(words) == 2 and words[0] != "max":
            quota, period = int(words[0]), int(words[1])
        if quota is not None and quota > 0 and period:
            threads = min(threads, max(1, math.ceil(quota / period)))
    return threads


def _folders(root: Path, own: Path, controller: str) -> list[Path]:
    """The folders of our cgroup and of those around it, in version 2 and version 1."""
    found = []
    for line in read_text(own).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        at = base / path.strip("/")
        # A container often sees its own cgroup as the root: a path that is not there is passed.
        around = [at, *(p for p in at.parents if p == base or base in p.parents)]
        found += [folder for folder in around if folder.is_dir()]
    found += [folder for folder in (root, root / controller) if folder.is_dir()]
    return list(dict.fromkeys(found))


def _number(path: Path) -> int | None:
    text = read_text(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _stat(path: Path, key: str) -> int:
    values = {}
    for line in read_text(path).splitlines():
        name, _, value = line.partition(" ")
        values[name] = int(value) if value.strip().isdigit() else 0
    return values.get(f"total_{key}", values.get(key, 0))


def machine_mark() -> str:
    """Eight characters that tell this machine from others by its name, and do not give it."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]
