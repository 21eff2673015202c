"""A parcel on its way: into a repository of a hub, in one commit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from halfbyte.errors import RunError
from halfbyte.finished.parcel_files import Parcel
from halfbyte.mirror.hub_request import HubRequests
from halfbyte.mirror.target import MirrorError
from halfbyte.redaction import redact

_REPO = re.compile(r"(?:hf://)?([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})/?")
_BRANCH = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)*")


@dataclass(frozen=True)
class Sent:
    """What became of a parcel."""

    made: bool  # the repository was not there before
    public: bool
    files: list[str]  # that were sent; the others were there already


def repository(name: str) -> str:
    """``OWNER/NAME``, as the hub spells it. Raises RunError for what is no such name."""
    found = _REPO.fullmatch(name)
    if found is None or ".." in name or "--" in name or name.endswith(".git"):
        raise RunError(f"{name} is no repository of a hub; write OWNER/NAME, your own name first.")
    return found[1]


def branch(name: str | None) -> str | None:
    """``name`` where a branch may be called so. Raises RunError where not."""
    if name is None or (_BRANCH.fullmatch(name) and ".." not in name):
        return name
    raise RunError(f"--revision {name} is no name of a branch; write letters, digits, - and _.")


def push(parcel: Parcel, repo: str, *, public: bool, revision: str | None, message: str) -> Sent:
    """Send ``parcel`` to the repository, which is made where it is not there.

    What is there already is not sent again, and all of it is one commit: nobody sees a part. Raises
    RunError, in one sentence, for whatever the hub or the network does not do, and for a repository
    that is open to all where ``public`` is not asked for.
    """
    hub = HubRequests(repo)
    try:
        with _as_paths(parcel) as paths:
            done = hub.do(
                "send",
                bytes=sum(parcel.sizes().values()),
                private=not public,
                revision=revision,
                files=paths,
                message=redact(message),
            )
    except MirrorError as error:
        raise RunError(
            f"{repo} did not get all of it: {error}; the same command then goes on where this one "
            "stopped."
        ) from error
    if done["public"] and not public:
        raise RunError(
            f"{repo} is open to all and was not made so here; add --public to send there all the "
            "same, or name another repository."
        )
    return Sent(done["made"], done["public"], done["sent"])


@contextmanager
def _as_paths(parcel: Parcel) -> Iterator[dict[str, str]]:
    """Paths of all files, those that have only a content here among them."""
    with TemporaryDirectory() as temporary:
        paths = {}
        for number, (name, content) in enumerate(parcel.files.items()):
            if isinstance(content, bytes):
                path = Path(temporary) / str(number)
                path.write_bytes(content)
                paths[name] = str(path)
            else:
                paths[name] = str(content.resolve())
        yield paths
