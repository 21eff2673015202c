"""Stands for halfbyte.kernels.trial.worker, and does with each kernel what the test says.

``python fake_trial_worker.py BEHAVIOUR SPEC [TASK ...]``, where BEHAVIOUR is a file of JSON: what
happens by task, "" being what happens to the process at its start.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def act(how: str, alone: bool) -> tuple[str, str]:
    """Verdict and reason, if there is a process left to give them."""
    if how == "abort" or (how == "abort beside others" and not alone):
        print("LLVM ERROR: cannot select", file=sys.stderr, flush=True)
        os.abort()
    if how == "exit":
        raise SystemExit("no device")
    if how == "hang":
        time.sleep(600)
    if how == "memory beside others":
        how = "ok" if alone else "memory"
    known = how in ("wrong", "failed", "broken", "memory")
    return (how, f"it is {how}") if known else ("ok", "")


def main(behaviour: Path, spec: Path, *tasks: str) -> None:
    how = json.loads(behaviour.read_text())
    act(how.get("", "ok"), False)
    for task in tasks or how["tasks"]:
        try:
            with (spec.parent / f"{task}.claim").open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            continue
        with (behaviour.parent / "tried").open("a") as file:
            file.write(f"{task}\n")
        verdict, reason = act(how.get(task, "ok"), bool(tasks))
        part = spec.parent / f"{task}.part"
        part.write_text(json.dumps({"verdict": verdict, "reason": reason}))
        part.replace(spec.parent / f"{task}.json")
        if verdict == "broken":
            raise SystemExit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
