"""What doctor says of machines that are not this one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from halfbyte.cli.cuda_driver import fits, newest_cuda
from halfbyte.cli.doctor_facts import Facts, Gpu, Package, Torch, nvidia_on_bus, runs_on
from halfbyte.cli.doctor_findings import Finding, judge

GB = 10**9
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GB, 79 * GB, (9, 0), True)
T4 = Gpu("Tesla T4", 15 * GB, 15 * GB, (7, 5), True)
CUDA_13 = Torch("2.13.0", "13.0", None, True, "", [H100])
UNUSABLE = replace(CUDA_13, usable=False, gpus=[])
CPU_BUILD = Torch("2.13.0+cpu", None, None, False, "")
GOOD = Facts(
    system="Linux",
    platform="Debian GNU/Linux 12, kernel 6.1, x86_64",
    wsl=False,
    python=(3, 12, 1),
    cpu="AMD EPYC 9654",
    cpu_bf16=True,
    threads=16,
    cores=16,
    memory_bytes=64 * GB,
    memory_free=60 * GB,
    memory_limit=None,
    folder="/home/me",
    folder_free=100 * GB,
    folder_writable=True,
    cache="/home/me/.cache/huggingface/hub",
    cache_free=100 * GB,
    driver="580.95.05",
    nvidia_card=True,
    visible_devices=None,
    torch=CUDA_13,
    packages=[Package("transformers", ">=5.17", "5.23.0", True)],
    triton="3.7.0",
    c_compiler=True,
    token=True,
    offline=False,
    endpoint="https://hub.example",
    reachable=None,
    chromium=True,
    pynvml=True,
)


@pytest.mark.parametrize(
    ("cuda", "driver", "expected"),
    [
        ("11.8", "450.80.02", True),
        ("11.8", "450.51.06", False),
        ("12.1", "525.60.13", True),
        ("12.8", "525.105.17", True),  # any 12 runs on the first driver of CUDA 12
        ("12.8", "525.60.11", False),
        ("12.6", "515.65.01", False),
        ("13.0", "580.65.06", True),
        ("13.0", "580.65.05", False),
        ("13.0", "575.57.08", False),
        ("13.0", "535.183.01", False),
        ("13.2", "590.10", True),
        ("14.0", "999.1", None),
        ("13.0", "N/A", None),
        ("?", "580.65.06", None),
    ],
)
def test_which_driver_runs_which_cuda(cuda: str, driver: str, expected: bool | None) -> None:
    assert fits(cuda, driver) is expected


@pytest.mark.parametrize(
    ("driver", "expected"),
    [("580.65.06", 13), ("579.99", 12), ("525.60.13", 12), ("470.256.02", 11), ("390.157", None)],
)
def test_the_newest_cuda_of_a_driver(driver: str, expected: int | None) -> None:
    assert newest_cuda(driver) == expected


@pytest.mark.parametrize(
    ("capability", "built", "expected"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80"], True),  # machine code runs on later minor versions
        ((8, 0), ["sm_86"], False),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_80", "compute_90"], True),  # portable code runs on all later ones
        ((12, 1), ["sm_120"], True),
        ((10, 3), ["sm_100a", "sm_90a"], False),  # "a" code runs on its own card alone
        ((9, 0), ["sm_90a"], True),
        ((6, 1), ["sm_75", "compute_75"], False),
    ],
)
def test_which_build_runs_on_which_card(
    capability: tuple[int, int], built: list[str], expected: bool
) -> None:
    assert runs_on(capability, built) is expected


@pytest.fixture(autouse=True)
def triton_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is on the machine that tests or not."""
    monkeypatch.setattr("halfbyte.kernels.triton_shim.INSTALLED", True)


def test_a_good_machine_has_nothing_to_mend() -> None:
    findings = judge(GOOD)
    assert {finding.level for finding in findings} == {"ok"}
    assert not any(finding.do for finding in findings)
    assert "bf16" in about(findings, "training").text


@pytest.mark.parametrize(
    ("change", "where", "level", "says", "do"),
    [
        (
            {"torch": UNUSABLE, "driver": "535.183.01"},
            "GPU",
            "problem",
            ["CUDA 13.0", "580.65.06", "535.183.01"],
            ["update the driver", "CUDA 12"],
        ),
        (
            {"torch": CPU_BUILD},
            "GPU",
            "problem",
            ["580.95.05", "built without CUDA"],
            ["CUDA 13"],
        ),
        ({"torch": CPU_BUILD, "driver": "470.82.01"}, "GPU", "problem", ["470"], ["CUDA 11"]),
        ({"torch": CPU_BUILD, "driver": None}, "GPU", "problem", ["no driver"], ["driver"]),
        (
            {"torch": CPU_BUILD, "driver": None, "nvidia_card": False},
            "GPU",
            "note",
            ["no NVIDIA GPU"],
            [],
        ),
        (
            {"torch": UNUSABLE, "visible_devices": ""},
            "GPU",
            "problem",
            ["CUDA_VISIBLE_DEVICES"],
            ["unset"],
        ),
        (
            {"torch": replace(UNUSABLE, error="CUDA unknown error")},
            "GPU",
            "problem",
            ["580.95.05", "CUDA unknown error"],
            ["nvidia-smi"],
        ),
        (
            {"torch": replace(CUDA_13, gpus=[replace(H100, has_kernels=False)])},
            "GPU",
            "problem",
            ["no code"],
            ["build"],
        ),
        ({"torch": replace(CUDA_13, gpus=[T4])}, "training", "ok", ["fp16", "loss scaling"], []),
        (
            {"torch": CPU_BUILD, "driver": None, "nvidia_card": False, "cpu_bf16": False},
            "training",
            "ok",
            ["CPU", "fp32"],
            [],
        ),
        ({"memory_free": GB}, "memory", "problem", ["1.00 GB free"], ["2 GB"]),
        ({"memory_limit": 64 * GB}, "memory", "ok", ["container"], []),
        ({"threads": 2}, "CPU", "ok", ["2 threads of 16"], []),
        ({"folder_writable": False}, "disk", "problem", ["cannot be written"], ["--out"]),
        ({"cache_free": GB}, "cache", "note", ["1.00 GB free"], ["HF_HOME"]),
        ({"wsl": True}, "system", "note", ["not tested"], []),
        ({"system": "Darwin"}, "system", "note", ["Darwin"], []),
        ({"python": (3, 14, 0)}, "Python", "note", ["3.14.0"], []),
        ({"token": False}, "hub", "note", ["not logged in"], ["HF_TOKEN"]),
        ({"reachable": ""}, "network", "ok", ["answers"], []),
        ({"reachable": "timed out"}, "network", "problem", ["timed out"], ["HTTPS_PROXY"]),
        ({"triton": None}, "kernels", "note", ["not installed"], ["pip install triton"]),
        ({"c_compiler": False}, "kernels", "problem", ["C compiler"], ["gcc"]),
        ({"torch": replace(CUDA_13, gpus=[T4])}, "kernels", "ok", ["element-wise", "cuBLAS"], []),
        (
            {"torch": replace(CUDA_13, gpus=[replace(T4, capability=(7, 0))])},
            "kernels",
            "note",
            ["PyTorch's own operations", "7.5"],
            [],
        ),
        ({"chromium": False}, "report", "note", ["no Chromium"], ["--pdf"]),
        ({"pynvml": False}, "energy", "note", ["energy"], ["nvidia-ml-py"]),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(
    change: dict[str, Any], where: str, level: str, says: list[str], do: list[str]
) -> None:
    findings = judge(replace(GOOD, **change))
    finding = about(findings, where)
    assert finding.level == level
    assert all(word in finding.text for word in says), finding.text
    assert all(word in finding.do for word in do), finding.do
    assert bool(finding.do) == bool(do)
    assert not any(f.blocks for f in findings), "one can train all the same"


def test_what_makes_training_impossible() -> None:
    old = Package("transformers", ">=5.17", "4.57.0", False)
    gone = Package("gguf", ">=0.18", None, False)
    findings = judge(replace(GOOD, packages=[old, gone]))
    blocking = [finding for finding in findings if finding.blocks]
    assert [f.do for f in blocking] == [
        "pip install 'transformers>=5.17'",
        "pip install 'gguf>=0.18'",
    ]
    broken = judge(replace(GOOD, torch="libcudart.so.13: cannot open shared object file"))
    assert about(broken, "PyTorch").blocks


def test_a_card_is_seen_on_the_bus(tmp_path: Path) -> None:
    for slot, (vendor, kind) in {
        "00:01.0": ("0x8086", "0x030000"),  # graphics of another maker
        "00:02.0": ("0x10de", "0x020000"),  # a network card of NVIDIA's
    }.items():
        (tmp_path / slot).mkdir()
        (tmp_path / slot / "vendor").write_text(vendor + "\n")
        (tmp_path / slot / "class").write_text(kind + "\n")
    assert not nvidia_on_bus(tmp_path)
    (tmp_path / "00:01.0" / "vendor").write_text("0x10de\n")
    assert nvidia_on_bus(tmp_path)
    assert not nvidia_on_bus(tmp_path / "none")


def test_the_command_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.cli.app import app

    secret = "hf_thisIsASecretThatNobodyMaySee"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setattr("halfbyte.cli.doctor_facts._reach", lambda _: pytest.fail("network used"))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    assert "halfbyte can train here" in done.output
    assert "a token is there" in done.output
    assert secret not in done.output

    old = [Package("transformers", ">=5.17", "4.57.0", False)]
    monkeypatch.setattr("halfbyte.cli.doctor_facts.read_packages", lambda: old)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 2
    assert "cannot train here" in done.output


def about(findings: list[Finding], what: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.about == what]
    return finding
