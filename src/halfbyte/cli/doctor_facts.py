"""What ``halfbyte doctor`` looks at: facts of this machine, no judgement of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from halfbyte.plan.machine import NVIDIA_DRIVER, memory_limit, read_text

_PCI = Path("/sys/bus/pci/devices")
_NVIDIA_VENDOR, _DISPLAY_CLASS = "0x10de", "0x03"


@dataclass(frozen=True)
class Gpu:
    """A GPU that PyTorch can use."""

    name: str
    memory_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    has_kernels: bool  # this PyTorch build has code for it


@dataclass(frozen=True)
class Torch:
    """PyTorch as installed."""

    version: str
    cuda: str | None  # the CUDA version it is built for
    hip: str | None  # the ROCm version it is built for
    usable: bool  # torch.cuda.is_available()
    error: str  # why it is not, in PyTorch's words
    gpus: list[Gpu] = field(default_factory=list)


@dataclass(frozen=True)
class Package:
    """A package that halfbyte needs."""

    name: str
    needs: str  # ">=5.17"
    installed: str | None
    fits: bool


@dataclass(frozen=True)
class Facts:
    """Everything that is judged."""

    system: str  # "Linux", "Darwin", "Windows"
    platform: str
    wsl: bool
    python: tuple[int, int, int]
    cpu: str
    cpu_bf16: bool
    threads: int
    cores: int  # of the machine, whatever this process may use
    memory_bytes: int  # that may be used here
    memory_free: int
    memory_limit: int | None  # of the container
    folder: str
    folder_free: int
    folder_writable: bool
    cache: str
    cache_free: int
    driver: str | None
    nvidia_card: bool  # on the bus, whether a driver runs it or not
    visible_devices: str | None  # CUDA_VISIBLE_DEVICES
    torch: Torch | str  # or why it cannot be imported
    packages: list[Package]
    triton: str | None
    c_compiler: bool  # Triton makes what launches its kernels with one
    token: bool
    offline: bool
    endpoint: str
    reachable: str | None  # None: not asked; "": yes; else why not
    chromium: bool
    pynvml: bool


def gather(*, network: bool = False) -> Facts:
    """Look at this machine; no network unless asked."""
    from halfbyte.plan.device import driver_version, find_device

    cpu = find_device("cpu")
    limit = memory_limit()
    folder, cache = Path.cwd(), _cache()
    token, offline, endpoint = _hub()
    return Facts(
        system=platform.system(),
        platform=_platform(),
        wsl="microsoft" in platform.release().lower(),
        python=sys.version_info[:3],
        cpu=cpu.name,
        cpu_bf16=cpu.bf16_native,
        threads=cpu.threads,
        cores=os.cpu_count() or cpu.threads,
        memory_bytes=cpu.memory_bytes,
        memory_free=cpu.free_bytes,
        memory_limit=None if limit is None else limit[0],
        folder=str(folder),
        folder_free=shutil.disk_usage(folder).free,
        folder_writable=os.access(folder, os.W_OK),
        cache=str(cache),
        cache_free=shutil.disk_usage(_existing(cache)).free,
        driver=_smi_driver() or driver_version(),
        nvidia_card=NVIDIA_DRIVER.exists() or nvidia_on_bus(_PCI),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        torch=read_torch(),
        packages=read_packages(),
        triton=_version("triton"),
        c_compiler=bool(os.environ.get("CC")) or any(map(shutil.which, ("gcc", "clang"))),
        token=token,
        offline=offline,
        endpoint=endpoint,
        reachable=_reach(endpoint) if network else None,
        chromium=_chromium(),
        pynvml=importlib.util.find_spec("pynvml") is not None,
    )


def read_torch() -> Torch | str:
    """PyTorch and the GPUs that it can use; a sentence where it cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of CUDA is missing
        return " ".join(str(error).split())
    error_text = ""
    usable = torch.cuda.is_available()
    if not usable and torch.version.cuda is not None:
        try:
            torch.zeros(1, device="cuda")
        except (RuntimeError, AssertionError) as error:
            error_text = " ".join(str(error).split())
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())] if usable else []
    hip = getattr(torch.version, "hip", None)
    return Torch(torch.__version__, torch.version.cuda, hip, usable, error_text, gpus)


def _gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    capability = (int(properties.major), int(properties.minor))
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError:  # a context cannot be made: another program holds the card for itself
        free, total = 0, properties.total_memory
    has_kernels = runs_on(capability, torch.cuda.get_arch_list())
    return Gpu(properties.name, int(total), int(free), capability, has_kernels)


def runs_on(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether a build for ``architectures`` ("sm_80", "compute_90") has code for ``capability``.

    Machine code runs on later minor versions of its major one, portable code on all later ones.
    """
    if not architectures:
        return True
    major, minor = capability
    for name in architectures:
        kind, _, number = name.partition("_")
        digits = number.rstrip("abcdefghijklmnopqrstuvwxyz")
        if not digits.isdigit():
            continue
        built = (int(digits) // 10, int(digits) % 10)
        if kind == "sm" and (
            built == capability or (digits == number and built[0] == major and built[1] <= minor)
        ):
            return True
        if kind == "compute" and digits == number and built <= capability:
            return True
    return False


def read_packages() -> list[Package]:
    """What the package's own metadata asks for, beside what is installed."""
    from packaging.requirements import Requirement  # transformers and torch's own need it

    try:
        lines = importlib.metadata.requires("halfbyte") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _version(requirement.name)
        fits = installed is not None and requirement.specifier.contains(installed, prereleases=True)
        found.append(Package(requirement.name, str(requirement.specifier), installed, fits))
    return found


def nvidia_on_bus(devices: Path) -> bool:
    """Whether an NVIDIA display or compute card is on the PCI bus."""
    return any(
        read_text(device / "vendor").strip() == _NVIDIA_VENDOR
        and read_text(device / "class").startswith(_DISPLAY_CLASS)
        for device in (devices.iterdir() if devices.is_dir() else ())
    )


def _smi_driver() -> str | None:
    """The driver as nvidia-smi tells it; None where there is no such program, or no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = done.stdout.split()
    return words[0] if done.returncode == 0 and words and words[0][0].isdigit() else None


def _platform() -> str:
    if platform.system() != "Linux":
        return platform.platform()
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        name = "Linux"
    return f"{name}, kernel {platform.release()}, {platform.machine()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cache() -> Path:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return Path.home() / ".cache" / "huggingface" / "hub"
    return Path(HF_HUB_CACHE)


def _hub() -> tuple[bool, bool, str]:
    """(a token is there, the hub client is told to stay offline, the hub's address)."""
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return False, False, ""
    return get_token() is not None, bool(constants.HF_HUB_OFFLINE), constants.ENDPOINT


def _reach(endpoint: str) -> str:
    """Empty where the hub answers, else why it does not."""
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return ""  # it answered
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return ""


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _chromium() -> bool:
    from halfbyte.report.pdf import PROGRAMS

    return any(shutil.which(name) for name in PROGRAMS)
