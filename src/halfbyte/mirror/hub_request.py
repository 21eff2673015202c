"""What is asked of the Hugging Face hub, each thing of a process of its own.

The hub's client waits for ever on a connection that is dead, and its threads keep a process from
ending. So a process of its own (``hub_worker``) does each thing and is ended when it takes
too long. Log-in is the client's own (``HF_TOKEN``, or what ``hf auth login`` keeps); no part of it
passes through here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from halfbyte.mirror.target import MirrorError

_SECONDS = 120.0  # for what sends little
_SLOWEST = 200_000  # bytes a second; slower is as good as hanging


class HubRequests:
    """The repository ``repo`` (``owner/name``) of the hub; one request at a time."""

    def __init__(self, repo: str) -> None:
        self.repo = repo
        self._worker: subprocess.Popen[str] | None = None
        self._given_up = False

    def give_up(self) -> None:
        self._given_up = True
        if self._worker is not None:
            with suppress(OSError):
                self._worker.kill()

    def do(self, what: str, *, bytes: int = 0, **more: Any) -> dict[str, Any]:
        """What the worker answers. Raises MirrorError for what it could not do, or not in time."""
        if self._given_up:
            raise MirrorError("ended", "the run has ended")
        limit = _SECONDS + bytes / _SLOWEST
        request = json.dumps({"do": what, "repo": self.repo, **more})
        # Where halfbyte was imported from, in case that is a path this process alone looks in.
        paths = [os.environ.get("PYTHONPATH"), str(Path(__file__).resolve().parents[2])]
        with subprocess.Popen(
            [sys.executable, "-P", "-m", "halfbyte.mirror.hub_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path for path in paths if path),
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            },
            start_new_session=True,  # Ctrl-C in the terminal is for the run
        ) as worker:
            self._worker = worker
            try:
                assert worker.stdin is not None
                assert worker.stdout is not None
                with suppress(OSError):
                    # Left open: its end tells the worker that this process has ended.
                    worker.stdin.write(request + "\n")
                    worker.stdin.flush()
                worker.wait(limit)
                answer = worker.stdout.read()
            except subprocess.TimeoutExpired:
                raise MirrorError(
                    "hangs", f"the hub was not done within {limit:,.0f} seconds; see the network"
                ) from None
            finally:
                worker.kill()
                self._worker = None
        if self._given_up:
            raise MirrorError("ended", "the run has ended")
        try:
            found: dict[str, Any] = json.loads(answer)
        except ValueError:
            text = f"the process that speaks with the hub ended with code {worker.returncode}"
            raise MirrorError("other", f"{text}; see the memory of this machine") from None
        if "error" in found:
            kind, text = found["error"]
            raise MirrorError(kind, text)
        return found
