"""The one form that every benchmark writes its results in."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("halfbyte", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


def write_results(
    name: str,
    rows: list[dict[str, Any]],
    device: str | None = None,
    *,
    versions: dict[str, str] | None = None,
    path: Path | None = None,
    command: str | None = None,
    commit: str | None = None,
    day: str | None = None,
) -> Path:
    """Write ``benchmarks/results/NAME.json``, or ``path``.

    Each row is ``{case, tool, metric, value, unit}``. ``device`` is by default this machine's CPU
    with its threads; the rest is by default of this process, and is given where the figures were
    made by another one.
    """
    path = path or ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(
        json.dumps(
            {
                "command": command or command_typed(),
                "commit": commit or commit_here(),
                "date": day or date.today().isoformat(),
                "device": device or _cpu(),
                "versions": versions or _versions(),
                "rows": [
                    {**row, "value": float(f"{row['value']:.6g}")}
                    if isinstance(row["value"], float)
                    else row
                    for row in rows
                ],
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    print(f"written: {shown}", file=sys.stderr)
    return path


def command_typed() -> str:
    """The command of this process as it would be typed in the repository."""
    # Paths by their last part: where a file lies on this machine says nothing to a reader.
    words = [Path(a).name if a.startswith(("/", "..")) else a for a in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def commit_here() -> str:
    """The commit that is checked out, empty outside a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # a machine without git
        return ""
    return done.stdout.strip()


def _cpu() -> str:
    import torch

    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model}, {capability}, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
