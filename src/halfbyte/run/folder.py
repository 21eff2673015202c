"""Run folders: their names, who may write into one, and which is the latest."""

from __future__ import annotations

import errno
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from halfbyte.errors import RunError
from halfbyte.events import read_events
from halfbyte.events.log import FILE_NAME as EVENTS_FILE
from halfbyte.events.types import Finished, RunStarted

LATEST = "latest"

# Errors that a disk gives: no room, also by a limit of its owner's; or no disk that works.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BROKEN = (errno.EIO, errno.EROFS, errno.ENODEV, errno.ESTALE, errno.ENOTCONN)

# What a run writes into its folder, and all that --overwrite removes.
CONTENTS = (
    "adapter",
    "initial_adapter",
    "checkpoints",
    "plots",
    "evaluation",
    "export",
    "tensorboard",
    "wandb",
    "trackers.json",
    "sbom.json",
    EVENTS_FILE,
    "recipe.yaml",
    "recipe.asked.yaml",
    "strategy.json",
    "report.md",
    "report.html",
    "report.pdf",
)


# What of these a checkpoint holds too, so that it alone is enough to go on from.
GOES_ON_WITH = (
    "recipe.yaml",
    "recipe.asked.yaml",
    "strategy.json",
    "trackers.json",
    "initial_adapter",
)


@dataclass(frozen=True)
class Claimed:
    """A run folder, and which folders on the way to it had to be made."""

    folder: Path
    made: list[Path]  # the innermost first

    def release(self) -> None:
        """Remove what was made, as long as it is empty."""
        with suppress(OSError):
            for folder in self.made:
                folder.rmdir()


def claim_folder(out: Path | None, runs: Path, recipe_name: str, *, overwrite: bool) -> Claimed:
    """The folder of a new run, made and empty of another run's files (unless ``overwrite``).

    Without ``out`` it is ``runs/<recipe>-<date>-<n>`` with the first free n. Raises RunError for
    a folder that holds a run, naming the next free one, and where no folder can be made.
    """
    if out is not None:
        if not overwrite:
            refuse_if_taken(out)
        return _make(out, exist_ok=True)
    n = 1
    while True:
        try:
            folder = runs / f"{folder_name(recipe_name)}-{date.today().isoformat()}-{n}"
            return _make(folder, exist_ok=False)
        except FileExistsError:
            n += 1


def folder_name(recipe_name: str) -> str:
    """How the name of a run folder begins, for a recipe of any name."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", recipe_name).strip("-.") or "run"


def _make(folder: Path, *, exist_ok: bool) -> Claimed:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except FileExistsError:
        if not exist_ok and folder.is_dir():
            raise
        raise RunError(
            f"{folder} is a file, so no run can be written there; choose another --out."
        ) from None
    except OSError as error:
        raise RunError(
            f"the run folder {folder} cannot be made ({error.strerror}); choose another --out."
        ) from error
    if not os.access(folder, os.W_OK):
        raise RunError(f"the run folder {folder} cannot be written; choose another --out.")
    return Claimed(folder, missing)


def refuse_if_taken(folder: Path) -> None:
    """Raises RunError where ``folder`` holds a run, finished or not."""
    if not (folder / EVENTS_FILE).exists():
        return
    if is_finished(folder):
        raise RunError(
            f"{folder} already holds a finished run; use --out {_next_free(folder)}, or "
            "--overwrite to replace it."
        )
    raise RunError(
        f"{folder} holds a run that has not finished; go on with it by "
        f"halfbyte train --resume {folder}, use --out {_next_free(folder)}, or --overwrite it."
    )


def _next_free(folder: Path) -> Path:
    n = 2
    while folder.with_name(f"{folder.name}-{n}").exists():
        n += 1
    return folder.with_name(f"{folder.name}-{n}")


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` by another name first: whoever reads it finds old or new."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def is_finished(folder: Path) -> bool:
    """Whether the last process of ``folder``'s run did its last step and saved its adapter."""
    finished = False
    for record in read_events(folder):
        if isinstance(record.event, RunStarted | Finished):
            finished = isinstance(record.event, Finished)
    return finished


def clear_folder(folder: Path) -> None:
    """Remove an earlier run's files from ``folder``, and nothing else."""
    for name in CONTENTS:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def point_latest(folder: Path, runs: Path) -> None:
    """Let ``runs/latest`` point at ``folder``."""
    runs.mkdir(parents=True, exist_ok=True)
    target = Path(os.path.relpath(folder.resolve(), runs.resolve()))
    partial = runs / f".{LATEST}.{os.getpid()}"
    partial.unlink(missing_ok=True)
    partial.symlink_to(target, target_is_directory=True)
    partial.replace(runs / LATEST)


def latest_run(runs: Path = Path("runs")) -> Path:
    """The folder that ``runs/latest`` points at. Raises RunError where there is none."""
    link = runs / LATEST
    if not link.is_symlink() or not link.is_dir():
        raise RunError(
            f"there is no latest run in {runs}/; name a run folder, or make one with "
            "halfbyte train RECIPE.yaml."
        )
    return runs / os.readlink(link)


def require_run(folder: Path) -> None:
    """Raises RunError unless ``folder`` holds a run's records."""
    if not (folder / EVENTS_FILE).exists():
        what = "does not exist" if not folder.exists() else f"holds no run (no {EVENTS_FILE})"
        raise RunError(f"{folder} {what}; name the folder that halfbyte train printed.")


def refuse_links(folder: Path) -> None:
    """Raises RunError where something that a run writes is a link, which may lead anywhere."""
    for name in CONTENTS:
        if (folder / name).is_symlink():
            raise RunError(
                f"{folder / name} is a link, and a run would write where it leads; remove it."
            )


def remove_partial_files(folder: Path) -> None:
    """Remove what a process that was killed had half written, but for checkpoints."""
    for path in (*folder.glob(".*.partial"), *folder.glob("plots/.*.partial")):
        if path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def check_space(folder: Path, needed: int) -> None:
    """Raises RunError where the disk of ``folder`` has not ``needed`` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"the disk of {folder} has {free / 1e6:,.0f} MB free and this run writes up to "
            f"{needed / 1e6:,.0f} MB; free some space or choose another --out."
        )


def disk_failure(error: Exception) -> tuple[str, str] | None:
    """What is wrong with a disk, and what to do, where that is what ``error`` comes from.

    safetensors and tokenizers write from Rust and raise errors of their own with its words.
    """
    numbers = (*_FULL, *_BROKEN)
    if isinstance(error, OSError):
        found = error.errno
    else:
        found = next((n for n in numbers if f"(os error {n})" in str(error)), None)
        if found is None and os.strerror(errno.ENOSPC) in str(error):
            found = errno.ENOSPC
    if found not in numbers or found is None:
        return None
    if found in _FULL:
        return f"is full ({os.strerror(found)})", "free some space"
    return f"cannot be written ({os.strerror(found)})", "see what is wrong with it"
