"""A run folder made again of a mirror: lost as a whole, or behind what the mirror holds."""

from __future__ import annotations

import shutil
from pathlib import Path

from halfbyte.checkpoint.files import checkpoints_in, read_state
from halfbyte.checkpoint.manifest import check_manifest
from halfbyte.errors import RunError
from halfbyte.events import Emit
from halfbyte.events.log import FILE_NAME as EVENTS_FILE
from halfbyte.events.types import Warned
from halfbyte.mirror.mirror import Mirror
from halfbyte.mirror.target import CHECKPOINTS, step_of
from halfbyte.run.folder import GOES_ON_WITH, is_finished
from halfbyte.run.lock import RunLock


def restore(where: str, folder: Path, emit: Emit) -> Path | None:
    """Bring ``folder`` to the newest whole checkpoint that the mirror ``where`` has of it.

    Returns that checkpoint; None where the mirror has none of this run, or none that is newer, or
    the run has finished. Where a folder that holds a run meets a mirror that cannot be reached,
    that is emitted; where nothing is in the folder it raises RunError, since a run that begins
    again would put its own checkpoints in the place of those there. Raises RunError, too, where
    the two hold different runs.
    """
    begun = (folder / EVENTS_FILE).exists()
    if begun and is_finished(folder):
        return None
    here = _newest_here(folder) if begun else None
    mirror = Mirror.open(where, folder, None, emit, must_answer=not begun)
    if mirror.run_id is None:
        return None
    run_id = None if here is None else read_state(here).run_id
    if run_id is not None and run_id != mirror.run_id:
        raise RunError(
            f"{folder} and the mirror {mirror.words} hold different runs; choose another --mirror, "
            "or another name for the run folder."
        )
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made ({error.strerror}).") from error
    with RunLock(folder, tell=lambda text: emit(Warned(text))):
        after = -1 if here is None else step_of(here.name)
        found = mirror.newest(folder / CHECKPOINTS, -1 if after is None else after)
        if found is not None:
            try:
                fill_folder(folder, found)
            except OSError as error:
                raise RunError(
                    f"{folder} cannot be made again of {found} ({error.strerror or error}); mend "
                    "that and begin once more."
                ) from error
            text = f"{folder} was brought to {found.name} from the mirror {mirror.words}"
            emit(Warned(text))
    if found is None and made:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def fill_folder(folder: Path, checkpoint: Path) -> None:
    """Put what ``checkpoint`` holds of its run's folder into ``folder``; the record last, by which
    a folder is known to hold a run."""
    for name in (*GOES_ON_WITH, EVENTS_FILE):
        source, target = checkpoint / name, folder / name
        if not source.exists():
            continue
        partial = folder / f".{name}.partial"
        if source.is_dir():
            for old in (partial, target):
                shutil.rmtree(old, ignore_errors=True)
            shutil.copytree(source, partial)
        else:
            shutil.copyfile(source, partial)
        partial.replace(target)


def _newest_here(folder: Path) -> Path | None:
    for path in reversed(checkpoints_in(folder / CHECKPOINTS)):
        try:
            check_manifest(path)
        except RunError:
            continue
        return path
    return None
