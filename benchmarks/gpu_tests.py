"""Run the tests that need a GPU, and record what they found.

    python benchmarks/gpu_tests.py [--write] [PYTEST_ARGUMENT ...]

Two runs of pytest: the tests marked ``gpu``, and those of the kernels, which run on the card where
there is one and in Triton's interpreter where there is none. With ``--write`` the counts of each
file are written to benchmarks/results/gpu_tests.json. Ends with 1 if a test failed.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from record import PACKAGES, ROOT, write_results

RUNS = (
    ["-m", "gpu", "tests"],
    ["-m", "not gpu", *(f"tests/{p.name}" for p in sorted(ROOT.glob("tests/test_kernels_*.py")))],
)
OUTCOMES = ("passed", "failed", "skipped")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    args, further = parser.parse_known_args()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: dict[str, float] = defaultdict(float)
    for words in RUNS:
        for file, outcome, took in run_pytest([*words, *further]):
            counts[file][outcome] += 1
            seconds[file] += took
    print(f"{'':44}{'passed':>8}{'failed':>8}{'skipped':>8}{'seconds':>9}")
    for file, found in sorted(counts.items()):
        shown = "".join(f"{found[outcome]:8}" for outcome in OUTCOMES)
        print(f"{file:44}{shown}{seconds[file]:9.1f}")
    if args.write:
        import torch

        write_results(
            "gpu_tests",
            make_rows(counts, seconds),
            device=torch.cuda.get_device_name(),
            versions=versions(torch),
        )
    return int(not counts or any(found["failed"] for found in counts.values()))


def run_pytest(words: list[str]) -> list[tuple[str, str, float]]:
    """File, outcome and seconds of each test."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *words]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if done.returncode not in (0, 1):  # interrupted, or nothing was collected
            raise SystemExit(done.returncode)
        return list(read_report(report))


def read_report(path: Path) -> Iterable[tuple[str, str, float]]:
    """What pytest's JUnit report says of each test."""
    for case in ElementTree.parse(path).iter("testcase"):
        parts = {child.tag for child in case}
        outcome = "failed" if parts & {"failure", "error"} else "passed"
        if "skipped" in parts:
            outcome = "skipped"
        # A file that is skipped as a whole has no class, and its name is where it stands.
        place = case.get("classname") or case.get("name", "")
        file = place.removeprefix("tests.").split(".")[0]
        yield f"tests/{file}.py", outcome, float(case.get("time", 0.0))


def make_rows(counts: dict[str, Counter[str]], seconds: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for file, found in sorted(counts.items()):
        for outcome in OUTCOMES:
            rows.append((file, outcome, found[outcome], "tests"))
        rows.append((file, "seconds", seconds[file], "s"))
    return [
        {"case": file, "tool": "pytest", "metric": metric, "value": value, "unit": unit}
        for file, metric, value, unit in rows
    ]


def versions(torch: Any) -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in (*PACKAGES, "triton", "pytest"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    raise SystemExit(main())
