"""The device is described from what Linux says, on machines that are not this one too."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from halfbyte.errors import DeviceError
from halfbyte.plan import device as device_module
from halfbyte.plan.device import environment_event, find_device
from halfbyte.plan.machine import memory_limit, read_processor, usable_threads

X86 = "processor\t: 0\nmodel name\t: {name}\nflags\t\t: fpu sse2 avx2 {flags}\n\nprocessor\t: 1\n"
GIB = 2**30


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ("", False),
        ("avx512f avx512bw avx512_vnni", False),  # AVX-512 alone multiplies no bf16
        ("avx512f avx512_bf16", True),
        ("amx_bf16 amx_tile", True),
        ("amx_tile amx_int8", False),
    ],
)
def test_bf16_is_native_only_with_instructions_for_it(
    flags: str, native: bool, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(X86.format(name="A CPU @ 2 GHz", flags=flags))
    processor = read_processor(tmp_path / "cpuinfo")
    assert (processor.name, processor.bf16_native) == ("A CPU @ 2 GHz", native)


def test_arm_calls_its_flags_features(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nFeatures : fp asimd i8mm bf16\n")
    assert read_processor(tmp_path / "cpuinfo").bf16_native
    (tmp_path / "cpuinfo").write_text("processor : 0\nFeatures : fp asimd\n")
    assert not read_processor(tmp_path / "cpuinfo").bf16_native
    assert read_processor(tmp_path / "nowhere").name  # no /proc: what Python knows


@pytest.mark.skipif(platform.machine() != "x86_64", reason="PyTorch tells this of x86 only")
def test_this_cpu_agrees_with_pytorch() -> None:
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert read_processor().bf16_native == native


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_the_tightest_limit_of_a_container_counts(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("0::/outer/inner\n")
    write(root / "outer", memory__max=f"{2 * GIB}\n", memory__current=f"{GIB}\n")
    write(
        root / "outer" / "inner",
        memory__max="max\n",
        memory__current="5\n",
        cpu__max="150000 100000\n",
    )
    (root / "outer" / "memory.stat").write_text(f"anon 1\ninactive_file {GIB // 2}\n")
    assert memory_limit(root, own) == (2 * GIB, GIB // 2)
    assert usable_threads(root, own) == min(2, len(os.sched_getaffinity(0)))
    # a container that sees its own cgroup as the root
    own.write_text("0::/not/to/be/seen\n")
    write(root, memory__max=f"{3 * GIB}\n", memory__current="0\n", cpu__max="50000 100000\n")
    assert memory_limit(root, own) == (3 * GIB, 0)
    assert usable_threads(root, own) == 1


def test_version_1_of_cgroups(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("5:memory:/job\n4:cpu,cpuacct:/job\n")
    write(root / "memory", memory__limit_in_bytes="9223372036854771712\n")
    write(
        root / "memory" / "job",
        memory__limit_in_bytes=f"{4 * GIB}\n",
        memory__usage_in_bytes=f"{GIB}\n",
    )
    write(root / "cpu" / "job", cpu__cfs_quota_us="100000\n", cpu__cfs_period_us="100000\n")
    assert memory_limit(root, own) == (4 * GIB, GIB)
    assert usable_threads(root, own) == 1
    assert memory_limit(tmp_path / "none", tmp_path / "none") is None


def test_a_containers_limit_bounds_the_devices_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_device("cpu")
    assert 0 < found.free_bytes <= found.memory_bytes <= psutil.virtual_memory().total
    monkeypatch.setattr(device_module, "memory_limit", lambda: (GIB, GIB // 4))
    bound = find_device("cpu")
    assert bound.memory_bytes == GIB
    assert bound.free_bytes <= GIB - GIB // 4


def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str) -> None:
    properties = SimpleNamespace(name=name, major=capability[0], minor=capability[1])
    for attribute, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda _: properties,
        "mem_get_info": lambda _: (15 * GIB, 16 * GIB),
    }.items():
        monkeypatch.setattr(torch.cuda, attribute, value)


def test_a_t4_is_taken_and_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, (7, 5), "Tesla T4")
    t4 = find_device("auto")
    assert (t4.kind, t4.name, t4.capability) == ("cuda", "Tesla T4", (7, 5))
    assert (t4.memory_bytes, t4.free_bytes, t4.bf16_native) == (16 * GIB, 15 * GIB, False)
    event = environment_event(t4)
    assert (event.gpu, event.gpu_capability, event.gpu_memory_bytes) == (
        "Tesla T4",
        "7.5",
        16 * GIB,
    )
    assert find_device("cpu").kind == "cpu"
    fake_gpu(monkeypatch, (8, 0), "A100")
    assert find_device("cuda").bf16_native


@pytest.mark.parametrize(
    ("build", "driver", "said"),
    [
        (None, "", "no NVIDIA driver was found"),
        (None, "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue", "for the CPU"),
        ("13.0", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue", "550.54.15"),
    ],
)
def test_a_gpu_that_is_not_there_is_one_sentence(
    build: str | None, driver: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "version").write_text(driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(device_module, "NVIDIA_DRIVER", tmp_path / "version")
    assert find_device("auto").kind == "cpu"
    with pytest.raises(DeviceError, match=said):
        find_device("cuda")


def test_the_environment_names_what_the_run_depends_on() -> None:
    event: Any = environment_event(find_device("cpu"))
    # A build names its CUDA version here and there, or only in one of the two.
    assert event.packages["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"halfbyte", "transformers", "tokenizers", "safetensors", "numpy"} <= set(event.packages)
    assert event.cpu
    assert event.cpu_threads >= 1
    assert (event.gpu, event.cuda, event.driver) == (None, None, None)
