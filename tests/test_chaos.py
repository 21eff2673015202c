"""A few faults of each kind, put into real runs; ``make chaos`` injects them all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos import CASES, table
from chaos_case import Lab, adapter_hash, checkpoints, has_step

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults are injected by forks")
FEW = {"killed at each call to the disk": 3, "killed at a random moment": 2}


@pytest.fixture(scope="module")
def lab(
    tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("chaos"), tiny_model, tiny_rows)
    yield lab
    lab.close()


@pytest.mark.parametrize("name", CASES)
def test_a_run_survives(lab: Lab, name: str) -> None:
    outcomes = list(CASES[name](lab, FEW.get(name, 1)))
    assert [text for text in outcomes if text is not None] == []
    if not outcomes:
        pytest.skip("this process may not mount a disk")


@pytest.mark.skipif("CHAOS" not in os.environ, reason="some minutes: make chaos")
def test_all_of_them(lab: Lab) -> None:
    assert not table(lab, os.environ["CHAOS"])


def test_the_command_itself(lab: Lab) -> None:
    """Processes from their first instruction to their last: killed, and asked to end."""
    folder = lab.folder()
    command = [sys.executable, "-m", "halfbyte", *lab.words(folder)]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=folder.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def until(step: int, process: subprocess.Popen[str]) -> None:
        while not has_step(folder, step):
            assert process.poll() is None
            time.sleep(0.005)

    killed = start()
    until(3, killed)
    killed.send_signal(signal.SIGSTOP)  # it lives, and does nothing meanwhile
    second = start()
    assert "is in use: process" in second.communicate()[0]
    assert second.returncode == 2
    killed.kill()
    killed.communicate()
    stopped = start()
    until(4, stopped)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.communicate()[0]
    assert stopped.returncode == 143
    assert checkpoints(folder)
    last = start()
    text = last.communicate()[0]
    assert last.returncode == 0, text
    assert adapter_hash(folder) == lab.reference
