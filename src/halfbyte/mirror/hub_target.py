"""A mirror in a repository of the Hugging Face hub.

The hub's client waits for ever on a connection that is dead, and its threads keep a process from
ending. So a process of its own (``hub_worker``) does each thing and is ended when it takes
too long. Log-in is the client's own (``HF_TOKEN``, or what ``hf auth login`` keeps); no part of it
passes through here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.manifest import check_manifest
from halfbyte.errors import RunError
from halfbyte.mirror.target import (
    CHECKPOINTS,
    IDENTITY,
    RESULTS,
    MirrorError,
    files_of,
    identity_of,
    identity_text,
)

SCHEME = "hf://"
_SECONDS = 120.0  # for what sends little
_SLOWEST = 200_000  # bytes a second; slower is as good as hanging
_PATTERN = re.compile(r"hf://([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)((?:/[\w.-]+)*)/?")


class HubTarget:
    """The folder ``sub/run`` of the repository in ``where``, ``hf://owner/repo`` or
    ``hf://owner/repo/sub``; a repository that is not there is made, as a private one.

    ``tell`` is called with a sentence where the repository is open to all.
    """

    patience = float("inf")  # each piece of work has its own limit

    def __init__(self, where: str, run: str) -> None:
        found = _PATTERN.fullmatch(where)
        parts = [] if found is None else found[2].strip("/").split("/")
        if found is None or ".." in parts or "." in parts:
            raise RunError(
                f"the mirror {where} is no repository of the hub; write hf://owner/name, or "
                "hf://owner/name/folder."
            )
        self.repo = found[1]
        self.path = "/".join([*filter(None, parts), run])
        self.words = f"{SCHEME}{self.repo}/{self.path}"
        self.public = False  # whether anybody may read it
        self._worker: subprocess.Popen[str] | None = None
        self._given_up = False

    def open(self, *, make: bool) -> str | None:
        found = self._do("open", make=make, identity=f"{self.path}/{IDENTITY}")
        self.public = bool(found["public"])
        text = found["identity"]
        return None if text is None else identity_of(text) or ""

    def take(self, run_id: str) -> None:
        self._do("take", identity=[f"{self.path}/{IDENTITY}", identity_text(run_id)])

    def names(self) -> list[str]:
        found = self._do("names", path="/".join(self.path.split("/")[:-1]), file=IDENTITY)
        return [str(name) for name in found["names"]]

    def steps(self) -> list[int]:
        found = self._do("steps", path=f"{self.path}/{CHECKPOINTS}")
        return [int(step) for step in found["steps"]]

    def put(self, checkpoint: Path, run_id: str, keep: Collection[int]) -> None:
        try:
            check_manifest(checkpoint)
        except RunError as error:
            raise MirrorError("damaged", str(error).rstrip(".")) from error
        files = {name: checkpoint / name for name in files_of(checkpoint)}
        self._do(
            "put",
            bytes=sum(path.stat().st_size for path in files.values()),
            path=f"{self.path}/{CHECKPOINTS}",
            name=checkpoint.name,
            files={name: str(path) for name, path in files.items()},
            keep=sorted(keep),
            identity=[f"{self.path}/{IDENTITY}", identity_text(run_id)],
        )

    def put_results(self, folder: Path, run_id: str) -> None:
        files: dict[str, Path] = {}
        for name in RESULTS:
            at = folder / name
            if at.is_dir():
                files |= {f"{self.path}/{name}/{inside}": at / inside for inside in files_of(at)}
            elif at.exists():
                files[f"{self.path}/{name}"] = at
        self._do(
            "results",
            bytes=sum(path.stat().st_size for path in files.values()),
            files={name: str(path) for name, path in files.items()},
        )

    def fetch(self, step: int, into: Path) -> None:
        path = f"{self.path}/{CHECKPOINTS}/step-{step}"
        # How much comes is not known; a user who waits for it can stop it.
        self._do("fetch", bytes=1 << 40, path=path, into=str(into))

    def give_up(self) -> None:
        self._given_up = True
        if self._worker is not None:
            with suppress(OSError):
                self._worker.kill()

    def _do(self, what: str, *, bytes: int = 0, **more: Any) -> dict[str, Any]:
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
