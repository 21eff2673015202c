"""The process that speaks with the hub: one request on standard input, one answer on standard
output, both JSON.

What the client's errors say is not passed on, since the addresses in them may hold signatures.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from halfbyte.checkpoint.manifest import NAME as MANIFEST
from halfbyte.mirror import hub_files
from halfbyte.mirror.target import step_of


def main() -> None:
    """Do what standard input asks for; end at once where whoever asked has ended."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answers, sys.stdout = sys.stdout, sys.stderr  # the client's own words are not the answer
    try:
        answer = _DO[request.pop("do")](**request)
    except Exception as error:
        answer = {"error": _clause(error, request["repo"])}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    os._exit(0)  # its threads may wait for a connection that is dead


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _open(repo: str, make: bool, identity: str) -> dict[str, Any]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    hub = HfApi()
    try:
        info = hub.repo_info(repo)
    except RepositoryNotFoundError:
        if not make:
            return {"public": False, "identity": None}
        hub.create_repo(repo, private=True, exist_ok=True)
        info = hub.repo_info(repo)
    return {"public": info.private is False, "identity": _text(repo, identity)}


def _take(repo: str, identity: list[str]) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, HfApi

    add = CommitOperationAdd(identity[0], identity[1].encode())
    HfApi().create_commit(repo, [add], commit_message="Begin a run")
    return {}


def _names(repo: str, path: str, file: str) -> dict[str, Any]:
    parts = [found.split("/") for found in _files(repo, path)]
    return {"names": sorted(run for run, *rest in parts if rest == [file])}


def _steps(repo: str, path: str) -> dict[str, Any]:
    names = {file.split("/")[0] for file in _files(repo, path) if file.endswith(f"/{MANIFEST}")}
    return {"steps": sorted(step for step in map(step_of, names) if step is not None)}


def _put(
    repo: str,
    path: str,
    name: str,
    files: dict[str, str],
    keep: list[int],
    identity: list[str],
) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    hub, at = HfApi(), f"{path}/{name}"
    if _text(repo, f"{at}/{MANIFEST}") != Path(files[MANIFEST]).read_text(encoding="utf-8"):
        adds = [CommitOperationAdd(f"{at}/{file}", source) for file, source in files.items()]
        if _text(repo, identity[0]) is None:
            adds.append(CommitOperationAdd(identity[0], identity[1].encode()))
        # One commit, so that nobody ever sees a part of it.
        hub.create_commit(repo, adds, commit_message=f"{name} of {path}")
    sizes = {file: Path(source).stat().st_size for file, source in files.items()}
    lacking = sizes.items() - _files(repo, at).items()
    if lacking:  # as where the repository's .gitignore names them
        text = f"{min(lacking)[0]} did not arrive; see the .gitignore of {repo}"
        return {"error": ("lacking", text)}
    there = {file.split("/")[0] for file in _files(repo, path)}
    leave = [old for old in there if old != name and step_of(old) not in (*keep, None)]
    if leave:
        deletes = [CommitOperationDelete(f"{path}/{old}/", is_folder=True) for old in leave]
        hub.create_commit(repo, deletes, commit_message=f"Remove {', '.join(leave)} of {path}")
    return {}


def _results(repo: str, files: dict[str, str]) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, HfApi

    adds = [CommitOperationAdd(name, at) for name, at in files.items()]
    HfApi().create_commit(repo, adds, commit_message="What the run made")
    return {}


def _fetch(repo: str, path: str, into: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    with TemporaryDirectory(dir=into) as temporary:  # the client's cache would keep it for ever
        for name in _files(repo, path):
            inside = PurePosixPath(name)
            if inside.is_absolute() or ".." in inside.parts or "\\" in name:
                continue  # no file of a checkpoint; what then lacks is found by the manifest
            found = hf_hub_download(repo, f"{path}/{name}", local_dir=temporary)
            target = Path(into, *inside.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            Path(found).replace(target)
    return {}


def _files(repo: str, path: str) -> dict[str, int]:
    """Bytes of the files below ``path``, by their names in it; none where there is no folder."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        tree = list(HfApi().list_repo_tree(repo, path or None, recursive=True))
    except (RemoteEntryNotFoundError, RepositoryNotFoundError):
        return {}
    found = (item for item in tree if isinstance(item, RepoFile))
    return {item.path.removeprefix(f"{path}/" if path else ""): item.size for item in found}


def _text(repo: str, path: str) -> str | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with TemporaryDirectory() as temporary:
        try:
            found = hf_hub_download(repo, path, local_dir=temporary)
        except RemoteEntryNotFoundError:  # and not the one for a hub that cannot be reached
            return None
        return Path(found).read_text(encoding="utf-8")


def _clause(error: Exception, repo: str) -> tuple[str, str]:
    """A kind of failure, and a clause without anything that only the log-in may know."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
    )

    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the client says with it which file it was at
    log_in = f"log in with hf auth login, or set HF_TOKEN to a token that may write to {repo}"
    if isinstance(error, LocalTokenNotFoundError):
        return "login", f"the hub knows no log-in on this machine; {log_in}"
    if constants.HF_HUB_OFFLINE:
        return "offline", "HF_HUB_OFFLINE is set, so the hub is not asked; unset it"
    if isinstance(error, LocalEntryNotFoundError):
        return "network", "the hub cannot be reached; see the network"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403, 404):
            return "login", f"the hub lets this log-in not write to {repo} ({status}); {log_in}"
        if status in (402, 413, 507):
            return "full", f"the hub takes no more ({status}); see the storage of {repo}'s owner"
        if status >= 500 or status == 429:
            return (
                "server",
                f"the hub did not answer as it should ({status}); it may be out of order",
            )
        return "refused", f"the hub refused ({status}); see whether {repo} is as it should be"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return "other", f"{error.filename} cannot be read or written ({error.strerror})"
    if isinstance(error, ValueError) and "README.md" in str(error):
        return (
            "card",
            "the hub takes no such metadata at the head of README.md; see its first lines",
        )
    if any(
        base.__module__.split(".")[0].startswith(("httpx", "requests", "httpcore"))
        for base in type(error).mro()
    ):
        return "network", f"the hub cannot be reached ({type(error).__name__}); see the network"
    return (
        "other",
        f"the hub's client failed ({type(error).__name__}); see whether it is up to date",
    )


_DO: dict[str, Callable[..., dict[str, Any]]] = {
    "open": _open,
    "take": _take,
    "names": _names,
    "steps": _steps,
    "put": _put,
    "results": _results,
    "fetch": _fetch,
    "send": hub_files.send,
}

if __name__ == "__main__":
    main()
