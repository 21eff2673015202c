"""A process that has imported everything and forks a ``halfbyte`` for each line that it reads.

Started cold, a run on the tiny model is all imports. A fork is the same process from the parsing of
the command line on: signals, files and exit code are its own. The parent never starts a thread.

In: ``{"argv": […], "folder": working directory, "out": file, "fault": {…}}``; out: its process id.
In: ``{"wait": process id}``; out: its exit code, negative for the signal that ended it, None where
it had to be ended because it hung.
With ``"disk": [bytes, …]`` one process after the other works in ``folder`` on a disk of so many
bytes each, which is really full when it is; ``"codes"`` is the file for their exit codes.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

LONGEST = 120.0  # seconds that a run of a few seconds takes at most

for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{library}_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def main() -> None:
    import halfbyte.cli.app
    import halfbyte.run.training  # noqa: F401
    from quick_plots import leave_out_pictures

    leave_out_pictures()
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            answer = _wait(asked["wait"])
        elif "import" in asked:
            answer = _import(Path(asked["import"]).read_text().split())
        else:
            answer = os.fork() or _child(asked, _on_disks if "disk" in asked else _run)
        print(json.dumps(answer), flush=True)


def _import(names: list[str]) -> int:
    """Import what a run needed."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception:
            continue
    assert len(os.listdir("/proc/self/task")) == 1, "a fork of several threads is no clean process"
    return 0


def _wait(pid: int) -> int | None:
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _child(asked: dict[str, Any], work: Callable[[dict[str, Any]], int]) -> NoReturn:
    code = 1
    try:
        if os.getpid() != os.getsid(0):
            os.setsid()
        os.chdir(asked["folder"])
        out = os.open(asked["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        code = work(asked)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(asked: dict[str, Any]) -> int:
    import chaos_faults
    from halfbyte.cli import main as halfbyte

    chaos_faults.inject(asked.get("fault") or {})
    sys.argv = ["halfbyte", *asked["argv"]]
    try:
        halfbyte()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    threading._shutdown()  # type: ignore[attr-defined]  # as the end of a process does
    if "modules" in asked:
        Path(asked["modules"]).write_text("\n".join(sorted(sys.modules)))
    return code


def _on_disks(asked: dict[str, Any]) -> int:
    import chaos_faults

    codes = []
    for number, size in enumerate(asked["disk"]):
        chaos_faults.mount(Path(asked["folder"]), size, again=number > 0)
        pid = os.fork() or _child(asked | {"out": f"{asked['out']}.{number}"}, _run)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    shutil.copytree(asked["folder"], asked["codes"] + ".folder")
    Path(asked["codes"]).write_text(json.dumps(codes))
    return 0


if __name__ == "__main__":
    main()
