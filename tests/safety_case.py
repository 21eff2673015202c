"""What tests of harmful files share: bombs, children with little memory, and how a command ends."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from typer.testing import CliRunner

from halfbyte.cli.app import app

EXECUTED = "executed"
GIGABYTE = 1 << 30


class Bomb:
    """Makes the folder ``executed`` where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (EXECUTED,)


BOMB = pickle.dumps({"weight": Bomb()})
# The same for whatever imports or runs a file.
CODE = f"import os\nos.mkdir({EXECUTED!r})\n"


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def halfbyte(*words: object) -> Ended:
    """The command in this process; a traceback is raised."""
    result = CliRunner().invoke(app, [str(word) for word in words], input="Hello\n")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ended(result.exit_code, result.stdout, result.stderr)


def sentence(ended: Ended) -> str:
    """The one sentence of a refusal."""
    assert ended.code == 2, ended
    assert ended.err.startswith("halfbyte: "), ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.rstrip().endswith((".", "?")), ended.err
    return ended.err.removeprefix("halfbyte: ").rstrip()


def refused(*words: object) -> str:
    """The sentence with which a command is refused, after which nothing was executed."""
    said = sentence(halfbyte(*words))
    assert not Path(EXECUTED).exists()
    return said


RECIPE = (
    "model: {name: ./model}\n"
    "data: {path: rows.jsonl, held_out: 4, max_length: 128}\n"
    "training: {batch_size: 4, gradient_accumulation: 1, max_steps: 2, logging_steps: 1}\n"
    "evaluation: {prompts: 1, max_new_tokens: 4, base_loss: false}\n"
)


def with_little_memory(code: str, *, memory: int, seconds: int = 60) -> Any:
    """What ``code`` leaves in ``found``, run where no more than ``memory`` bytes can be added.

    ``code`` may import at its beginning: the limit holds from the line ``begin()`` on. The
    processor's time is limited to ``seconds``.
    """
    script = (
        "import json, resource, sys\n"
        "found = None\n"
        "def begin():\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        f"    resource.setrlimit(resource.RLIMIT_AS, (used + {memory},) * 2)\n"
        f"{code}\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=4 * seconds,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds)),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
