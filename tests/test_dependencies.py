"""What is pinned, locked by hash and audited."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_every_pinned_package_is_locked_by_hash_in_the_same_version() -> None:
    """``make lock`` writes both; one that is edited by hand is not what is installed."""
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", text_of("constraints.txt"), re.MULTILINE))
    locked: dict[str, str] = {}
    for name in ("ci", "torch", "cuda"):
        for block in re.split(r"\n(?=[a-z])", text_of(f"requirements/{name}.txt")):
            match = re.match(r"([\w.-]+)==([^\s;]+)", block)
            if match is not None:
                locked[normal(match[1])] = match[2]
                assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block
    missing = {n: v for n, v in pinned.items() if locked.get(normal(n)) != v}
    assert missing == {}
    cpu = text_of("requirements/torch-cpu.txt")
    assert re.search(
        rf"^torch=={pinned['torch']}\+cpu \\\n +--hash=sha256:[0-9a-f]{{64}}$", cpu, re.M
    )


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("printed", "code", "said"),
    [
        ("", 2, "the data on vulnerabilities could not be had"),
        ({"dependencies": [{"name": "a", "skip_reason": "not found"}]}, 2, "no data"),
        ({"dependencies": [{"name": "a", "version": "1", "vulns": []}]}, 0, "0 of 1 packages"),
        (
            {
                "dependencies": [
                    {"name": "b", "version": "1", "vulns": [{"id": "X-1", "fix_versions": ["2"]}]},
                    {"name": "a", "skip_reason": "not found"},
                ]
            },
            1,
            "b 1: X-1, fixed in 2\naudit: nothing is known of a\n",
        ),
    ],
)
def test_an_audit_without_data_does_not_pass(
    tmp_path: Path, printed: object, code: int, said: str
) -> None:
    program = tmp_path / "pip-audit"
    text = json.dumps(printed) if printed else ""
    program.write_text(f"#!{sys.executable}\nprint({text!r})\n")
    program.chmod(0o755)
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "audit.py", program], capture_output=True, text=True
    )
    assert done.returncode == code
    assert said in done.stdout
