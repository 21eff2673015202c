"""A mirror in a folder: another disk, a network share, a mounted drive."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from halfbyte.checkpoint.manifest import NAME as MANIFEST
from halfbyte.checkpoint.manifest import check_manifest
from halfbyte.errors import RunError
from halfbyte.mirror.target import (
    CHECKPOINTS,
    IDENTITY,
    RESULTS,
    MirrorError,
    Progress,
    files_of,
    identity_of,
    identity_text,
    step_of,
)

_CHUNK = 4 << 20  # bytes between two signs of progress
# What a path that was there gives once its disk is gone.
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ENOTCONN, errno.ESTALE, errno.EIO, errno.ENODEV)


class FolderTarget:
    """The folder ``root/run``. What is written there has a hidden name until it is whole."""

    patience = 60.0

    def __init__(self, root: Path, run: str, progress: Progress = lambda: None) -> None:
        self.root = root
        self.folder = root / run
        self.words = str(self.folder)
        self._progress = progress
        self._checkpoints = self.folder / CHECKPOINTS
        self._given_up = False
        self._known = False  # that the run's folder is there
        self._tidied = False

    def open(self, *, make: bool) -> str | None:
        with self._one_clause():
            if make:
                # Not its parents: where they are missing a disk is, or a name is wrong.
                self.root.mkdir(exist_ok=True)
            if self.root.exists() and not self.root.is_dir():
                raise MirrorError("refused", f"{self.root} is a file; name a folder")
            if not self.folder.exists():
                return None
            if not (self.folder / IDENTITY).exists():
                others = [p for p in self.folder.iterdir() if not p.name.startswith(".")]
                return "" if others else None
            self._known = True
            return identity_of((self.folder / IDENTITY).read_text(encoding="utf-8")) or ""

    def take(self, run_id: str) -> None:
        with self._one_clause(), self._new(self.folder / IDENTITY) as partial:
            partial.write_text(identity_text(run_id), encoding="utf-8")

    def names(self) -> list[str]:
        with self._one_clause():
            if not self.root.is_dir():
                return []
            return sorted(p.name for p in self.root.iterdir() if (p / IDENTITY).is_file())

    def steps(self) -> list[int]:
        with self._one_clause():
            if not self._checkpoints.is_dir():
                return []
            found = [
                step
                for path in self._checkpoints.iterdir()
                if (step := step_of(path.name)) is not None and (path / MANIFEST).is_file()
            ]
            return sorted(found)

    def put(self, checkpoint: Path, run_id: str, keep: Collection[int]) -> None:
        with self._one_clause():
            self._begin(run_id)
            self._checkpoints.mkdir(exist_ok=True)
            self._tidy()
            final = self._checkpoints / checkpoint.name
            if not self._is_there(checkpoint, final):
                with self._new(final) as partial:
                    partial.mkdir()
                    for name in files_of(checkpoint):
                        self._copy(checkpoint / name, partial / name)
                    self._verify(partial)
            for step in self.steps():
                if step not in keep and step != step_of(checkpoint.name):
                    self._remove(self._checkpoints / f"step-{step}")

    def put_results(self, folder: Path, run_id: str) -> None:
        with self._one_clause():
            self._begin(run_id)
            for name in RESULTS:
                source = folder / name
                if not source.exists():
                    continue
                with self._new(self.folder / name) as partial:
                    if source.is_dir():
                        partial.mkdir()
                        for inside in files_of(source):
                            self._copy(source / inside, partial / inside)
                    else:
                        self._copy(source, partial)

    def fetch(self, step: int, into: Path) -> None:
        source = self._checkpoints / f"step-{step}"
        with self._one_clause():
            for name in files_of(source):
                self._copy(source / name, into / name)

    def give_up(self) -> None:
        self._given_up = True

    def _begin(self, run_id: str) -> None:
        """Have the run's folder there, named for the run."""
        identity = self.folder / IDENTITY
        if identity.exists():
            return
        if self._known or not self.root.is_dir():
            # Never made anew: an empty folder may be where a disk was mounted.
            text = f"{self.words} is no longer what it was; see whether its disk is there"
            raise MirrorError("gone", text)
        self.folder.mkdir(exist_ok=True)
        with self._new(identity) as partial:
            partial.write_text(identity_text(run_id), encoding="utf-8")
        self._known = True

    def _is_there(self, checkpoint: Path, final: Path) -> bool:
        """Whether an earlier process has copied this very checkpoint."""
        manifest = final / MANIFEST
        same = manifest.is_file() and manifest.read_bytes() == (checkpoint / MANIFEST).read_bytes()
        with suppress(RunError):
            if same:
                check_manifest(final)
                return True
        return False

    def _verify(self, folder: Path) -> None:
        try:
            check_manifest(folder)
        except RunError as error:
            raise MirrorError(
                "damaged", f"the copy is not what the checkpoint's {MANIFEST} lists: {error}"
            ) from error

    def _copy(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as old, target.open("xb") as new:
            while chunk := old.read(_CHUNK):
                if self._given_up:
                    raise MirrorError("ended", "the run has ended")
                new.write(chunk)
                self._progress()
            new.flush()
            _sync(new.fileno())

    @contextmanager
    def _new(self, final: Path) -> Iterator[Path]:
        """Gives a hidden path for what is to be ``final``; one that is there is replaced."""
        partial = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
        try:
            yield partial
            if final.is_dir() and not final.is_symlink():
                self._remove(final)  # no system renames onto a folder that holds something
            partial.replace(final)
            with suppress(OSError):  # Windows opens no folders
                fd = os.open(final.parent, os.O_RDONLY)
                _sync(fd)
                os.close(fd)
        except BaseException:
            _clear(partial)
            raise

    def _remove(self, path: Path) -> None:
        hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
        path.rename(hidden)  # at once, so that no half is ever seen
        _clear(hidden)

    def _tidy(self) -> None:
        """Remove what a process that was ended in the middle left here."""
        if not self._tidied:
            for folder in (self.folder, self._checkpoints):
                for path in folder.glob(".*"):
                    if path.suffix in (".partial", ".old"):
                        _clear(path)
            self._tidied = True

    @contextmanager
    def _one_clause(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or type(error).__name__
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise MirrorError(
                    "full", f"its disk is full ({reason}); free some space"
                ) from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                text = f"it cannot be written ({reason}); see whose folder it is"
                raise MirrorError("refused", text) from error
            if error.errno in _GONE:
                where = error.filename or self.words
                text = f"{where} cannot be reached ({reason}); see whether its disk is there"
                raise MirrorError("gone", text) from error
            raise MirrorError("other", f"{reason}; see {self.words}") from error


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _sync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some drives have no such thing
            raise
