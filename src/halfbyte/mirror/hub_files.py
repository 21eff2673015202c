"""Files for a repository of the hub, sent in one commit; runs in the process ``hub_worker``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

_PIECE = 1 << 20


def send(
    repo: str, private: bool, revision: str | None, files: dict[str, str], message: str
) -> dict[str, Any]:
    """Send those of ``files`` (name there: path here) that are not there, or are others there.

    The repository, and the branch ``revision`` in it, are made where they are not there yet. One
    that is there stays as open or closed as it is; into one that is open nothing is sent where
    ``private`` is asked for. Large files that an earlier attempt has brought over are not sent
    again, which the hub tells by their SHA-256. Answered are whether the repository was made,
    whether anybody may read it, and the names that were sent.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    hub, made = HfApi(), False
    try:
        info = hub.repo_info(repo)
    except RepositoryNotFoundError:
        hub.create_repo(repo, private=private, exist_ok=True)
        info, made = hub.repo_info(repo), True
    found: dict[str, Any] = {"made": made, "public": info.private is False, "sent": []}
    if found["public"] and private:
        return found
    if revision is not None:
        hub.create_branch(repo, branch=revision, exist_ok=True)
    there = _tree(repo, revision)
    lacking = [name for name, path in files.items() if not _same(Path(path), there.get(name))]
    if lacking:
        adds = [CommitOperationAdd(name, files[name]) for name in lacking]
        # One commit, so that nobody ever sees a part of it.
        hub.create_commit(repo, adds, commit_message=message, revision=revision)
        now = _tree(repo, revision)
        for name, path in files.items():
            if name not in now or now[name].size != Path(path).stat().st_size:
                text = f"{name} did not arrive; see the .gitignore of {repo}"
                return {"error": ("lacking", text)}
    return found | {"sent": lacking}


def _tree(repo: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RemoteEntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        tree = list(HfApi().list_repo_tree(repo, recursive=True, revision=revision))
    except RemoteEntryNotFoundError:  # nothing was ever sent
        return {}
    return {item.path: item for item in tree if isinstance(item, RepoFile)}


def _same(path: Path, there: Any) -> bool:
    """Whether the hub's file ``there`` has the content of ``path``."""
    size = path.stat().st_size
    if there is None or there.size != size:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == _digest(path, hashlib.sha256()))
    return bool(there.blob_id == _digest(path, hashlib.sha1(b"blob %d\0" % size)))


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return str(digest.hexdigest())
