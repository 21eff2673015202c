"""A mirror in a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from halfbyte.checkpoint.manifest import check_manifest
from halfbyte.errors import RunError
from halfbyte.mirror.hub_request import HubRequests
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
_PATTERN = re.compile(r"hf://([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)((?:/[\w.-]+)*)/?")


class HubTarget(HubRequests):
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
        super().__init__(found[1])
        self.path = "/".join([*filter(None, parts), run])
        self.words = f"{SCHEME}{self.repo}/{self.path}"
        self.public = False  # whether anybody may read it

    def open(self, *, make: bool) -> str | None:
        found = self.do("open", make=make, identity=f"{self.path}/{IDENTITY}")
        self.public = bool(found["public"])
        text = found["identity"]
        return None if text is None else identity_of(text) or ""

    def take(self, run_id: str) -> None:
        self.do("take", identity=[f"{self.path}/{IDENTITY}", identity_text(run_id)])

    def names(self) -> list[str]:
        found = self.do("names", path="/".join(self.path.split("/")[:-1]), file=IDENTITY)
        return [str(name) for name in found["names"]]

    def steps(self) -> list[int]:
        found = self.do("steps", path=f"{self.path}/{CHECKPOINTS}")
        return [int(step) for step in found["steps"]]

    def put(self, checkpoint: Path, run_id: str, keep: Collection[int]) -> None:
        try:
            check_manifest(checkpoint)
        except RunError as error:
            raise MirrorError("damaged", str(error).rstrip(".")) from error
        files = {name: checkpoint / name for name in files_of(checkpoint)}
        self.do(
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
        self.do(
            "results",
            bytes=sum(path.stat().st_size for path in files.values()),
            files={name: str(path) for name, path in files.items()},
        )

    def fetch(self, step: int, into: Path) -> None:
        path = f"{self.path}/{CHECKPOINTS}/step-{step}"
        # How much comes is not known; a user who waits for it can stop it.
        self.do("fetch", bytes=1 << 40, path=path, into=str(into))
