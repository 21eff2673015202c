"""A run on the tiny model, its uninterrupted outcome, and ways to disturb it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECIPE = {
    "device": "cpu",
    "lora": {"r": 4, "lora_dropout": 0.1},
    "training": {"batch_size": 2, "gradient_accumulation": 2, "max_steps": 6},
    "evaluation": {"every_steps": 2, "prompts": 0, "base_loss": False},
}
HIDDEN = (".partial", ".removed", ".old", ".next")


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it wrote on the terminal."""

    code: int | None  # negative for a signal, None where it hung
    text: str

    @property
    def orderly(self) -> bool:
        """A good end, a sentence, or the signal that it was sent; no traceback."""
        return self.code in (0, 2, 130, 143, -9, -15) and "Traceback" not in self.text


class Lab:
    """Makes runs. ``reference`` is the hash of the adapter of one that nothing happened to."""

    def __init__(self, place: Path, model: Path, rows: Path) -> None:
        self.place = place
        self._number = 0
        recipe = {
            **RECIPE,
            "model": {"name": str(model)},
            "data": {"path": str(rows), "held_out": 4},
        }
        (place / "recipe.yaml").write_text(json.dumps(recipe))
        path = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
        self._server = subprocess.Popen(
            [sys.executable, str(HERE / "chaos_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        warm, modules = self.folder(), place / "modules"
        ended = self.train(warm, modules=str(modules))
        assert ended.code == 0, ended.text
        self._ask({"import": str(modules)})
        self.reference = adapter_hash(warm)
        began = time.monotonic()
        calls = place / "calls"
        other = self.folder()
        self.train(other, fault=self.at_call(other, 0, 0) | {"count": str(calls)})
        self.seconds = time.monotonic() - began
        self.calls = calls.read_text().splitlines()
        assert adapter_hash(other) == self.reference

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def folder(self) -> Path:
        """A run folder that is not there yet, in a folder of its own."""
        self._number += 1
        outside = self.place / f"case-{self._number}"
        outside.mkdir()
        return outside / "run"

    def at_call(
        self, folder: Path, at: int, code: int | str, *, stays: bool = False
    ) -> dict[str, Any]:
        """The fault at the call number ``at``, from 1, that changes what lies beside ``folder``."""
        below = str(folder.parent)
        return {"kind": "call", "below": below, "at": at, "code": code, "stays": stays}

    def words(self, folder: Path) -> list[str]:
        return ["train", str(self.place / "recipe.yaml"), "--resume", "auto", "--out", str(folder)]

    def begin(self, folder: Path, *more: str, **asked: Any) -> int:
        """Start ``halfbyte train`` for ``folder``; its process id."""
        request = {
            "argv": [*self.words(folder), *more],
            "folder": str(folder.parent),
            "out": str(folder.parent / "terminal"),
            **asked,
        }
        return int(self._ask(request))  # type: ignore[arg-type]

    def end(self, pid: int, folder: Path) -> Ended:
        """Wait for a process."""
        code = self._ask({"wait": pid})
        assert code is None or isinstance(code, int)
        said = folder.parent / "terminal"  # not there, where it was killed in its first instant
        return Ended(code, said.read_text(errors="replace") if said.exists() else "")

    def train(
        self,
        folder: Path,
        *more: str,
        after: float | None = None,
        number: int = signal.SIGKILL,
        when: Callable[[], bool] | None = None,
        act: Callable[[], object] = lambda: None,
        **asked: Any,
    ) -> Ended:
        """Run it to its end. A signal comes ``after`` so many seconds; ``act`` is called ``when``
        something is so."""
        pid = self.begin(folder, *more, **asked)
        if after is not None:
            time.sleep(after)
            _signal(pid, number)
        if when is not None:
            while not when() and _runs(pid):
                time.sleep(0.002)
            act()
        return self.end(pid, folder)

    def made_up_for(self, folder: Path, ended: Ended, *more: str) -> str | None:
        """What is wrong after a fault and going on from it; None where nothing is."""
        if ended.code is None:
            return "the run hung"
        if not ended.orderly:
            return f"it ended with {ended.code}: {ended.text.strip().splitlines()[-1:]}"
        wrong = damaged(folder)
        if wrong:
            return f"what is damaged looks whole: {wrong}"
        finished = has_event(folder, "finished")
        again = self.train(folder, *more)
        if again.code != 0:
            return f"it did not go on ({again.code}): {again.text.strip().splitlines()[-1:]}"
        # A run that had finished is not begun again, so that nothing clears what was left then.
        return self.unlike(folder, cleared=not finished)

    def unlike(self, folder: Path, *, cleared: bool = True) -> str | None:
        """How a finished run differs from one that nothing happened to; unless its last process
        ``cleared`` it, hidden files and a dead lock may be left."""
        if adapter_hash(folder) != self.reference:
            return "the adapter is another one"
        if damaged(folder):
            return f"damaged: {damaged(folder)}"
        places = [*folder.glob(".*"), *folder.glob("adapter/.*"), *folder.glob("checkpoints/.*")]
        # A report's names are drawn by chance, so that its next one cannot know the half of one.
        left = [p.name for p in places if p.name.endswith(HIDDEN) and "report" not in p.name]
        left += [path.name for path in folder.glob("run.lock")]
        return f"left behind: {left}" if left and cleared else None

    def _ask(self, request: dict[str, Any]) -> object:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def adapter_hash(folder: Path) -> str:
    path = folder / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "none"


def checkpoints(folder: Path) -> list[Path]:
    """Those that have their final name, the newest last."""
    found = [p for p in (folder / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def damaged(folder: Path) -> list[str]:
    """Checkpoints with their final name that are not what their manifest lists."""
    wrong = []
    for path in checkpoints(folder):
        try:
            listed = json.loads((path / "manifest.json").read_text())["files"]
            whole = all(
                hashlib.sha256((path / name).read_bytes()).hexdigest() == entry["sha256"]
                for name, entry in listed.items()
            )
        except (OSError, ValueError, KeyError):
            whole = False
        if not whole:
            wrong.append(path.name)
    return wrong


def has_step(folder: Path, step: int) -> bool:
    """Whether the record says that a step was done."""
    return f'"step": {step}' in _record(folder)


def has_event(folder: Path, kind: str) -> bool:
    """Whether an event of the kind is in the record."""
    return f'"kind": "{kind}"' in _record(folder)


def _record(folder: Path) -> str:
    try:
        return (folder / "events.jsonl").read_text(errors="replace")
    except OSError:
        return ""


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it had ended
        os.kill(pid, number)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
