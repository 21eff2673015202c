"""Which NVIDIA driver a CUDA build of PyTorch needs."""

from __future__ import annotations

import re

# The oldest Linux driver of each CUDA major version that runs every minor one of it (NVIDIA, CUDA
# Compatibility, "minor version compatibility"; CUDA Toolkit release notes, table 2).
MINIMUM_DRIVER = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}
_SPELLED = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}


def fits(cuda: str, driver: str) -> bool | None:
    """Whether ``driver`` ("535.183.01") runs what is built for ``cuda`` ("12.8").

    None where it is not known: an unread version, or a CUDA newer than this table.
    """
    minimum = MINIMUM_DRIVER.get(_major(cuda))
    version = _version(driver)
    if minimum is None or version is None:
        return None
    return version >= minimum


def minimum_driver(cuda: str) -> str | None:
    """The oldest driver for ``cuda`` as NVIDIA writes it; None where it is not known."""
    return _SPELLED.get(_major(cuda))


def newest_cuda(driver: str) -> int | None:
    """The newest CUDA major version that ``driver`` runs; None where it runs none known."""
    version = _version(driver)
    if version is None:
        return None
    runs = [major for major, minimum in MINIMUM_DRIVER.items() if version >= minimum]
    return max(runs, default=None)


def _major(cuda: str) -> int:
    found = re.match(r"\d+", cuda)
    return int(found[0]) if found else 0


def _version(driver: str) -> tuple[int, ...] | None:
    if not re.fullmatch(r"\d+(\.\d+)+", driver):
        return None
    return tuple(int(part) for part in driver.split("."))
