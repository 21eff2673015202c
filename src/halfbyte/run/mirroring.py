"""A run and its mirror: brought back from it before it begins, copied to it as it goes."""

from __future__ import annotations

from pathlib import Path

from halfbyte.checkpoint.files import kept_steps, prune_checkpoints
from halfbyte.checkpoint.writer import CheckpointWriter, Written
from halfbyte.errors import RunError
from halfbyte.events import Emit
from halfbyte.events.types import Warned
from halfbyte.mirror.mirror import END_SECONDS, Mirror, names_in
from halfbyte.recipe import Recipe
from halfbyte.run.place import AUTO, begun_in, newest_name
from halfbyte.run.record import RunRecord
from halfbyte.run.restore import restore

# A run that was stopped has seconds before its machine goes.
STOPPED_SECONDS = 20.0


def with_mirror(recipe: Recipe, mirror: str | None) -> Recipe:
    """``recipe`` with another mirror, where one is given."""
    if mirror is None:
        return recipe
    checkpoints = recipe.checkpoints.model_copy(update={"mirror": mirror})
    return recipe.model_copy(update={"checkpoints": checkpoints})


def bring_back(
    where: str, *, resume: Path | str, out: Path | None, runs: Path, recipe_name: str, emit: Emit
) -> None:
    """Make the folder of the run that is to go on again of the mirror ``where``, if it is lost or
    behind. ``resume``, ``out``, ``runs`` and ``recipe_name`` are as ``find_place`` has them.

    Raises RunError as ``restore`` does.
    """
    if str(resume) != AUTO:
        restore(where, Path(resume), emit)
        return
    if out is not None:
        restore(where, out, emit)
        return
    begun = begun_in(runs)
    try:
        there = names_in(where)
    except RunError as error:
        if newest_name(begun, recipe_name) is None:
            raise
        emit(Warned(str(error)))
        return
    newest = newest_name([*begun, *there], recipe_name)
    if newest is not None and newest in there:
        restore(where, runs / newest, emit)


class Mirroring:
    """What a run does for its mirror; nothing where it has none.

    A context around all that the run does; ``begin`` once its id is known. At the end waits for the
    mirror: as long as ``END_SECONDS`` where the run has ``ended`` and its results go there too,
    else ``STOPPED_SECONDS``.
    """

    def __init__(self, folder: Path, record: RunRecord) -> None:
        self.folder = folder
        self.ended = False
        self._record = record
        self._mirror: Mirror | None = None
        self._writer: CheckpointWriter | None = None
        self._best: int | None = None

    def begin(self, where: str | None, run_id: str, *, new: bool) -> None:
        """Open the mirror. Raises RunError where it cannot be one, or holds another run, and for a
        ``new`` run where it cannot be reached."""
        if where is not None:
            self._mirror = Mirror.open(where, self.folder, run_id, self._record, must_answer=new)

    def follow(self, writer: CheckpointWriter) -> None:
        """Let ``writer`` keep the folders that are being copied."""
        if self._mirror is not None:
            self._writer = writer
            writer.spare = self._mirror.in_use

    def copy(self, written: Written) -> None:
        """Have a finished checkpoint copied."""
        if self._mirror is not None and self._writer is not None:
            self._best = written.state.best_step
            self._mirror.send(written.path, self._kept(self._writer))

    def tell(self) -> None:
        """Emit what the mirror has to say."""
        if self._mirror is not None:
            self._mirror.tell()

    def __enter__(self) -> Mirroring:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._mirror is None or self._writer is None:
            return
        results = self.folder if self.ended else None
        wait = END_SECONDS if self.ended else STOPPED_SECONDS
        if error is not None and not issubclass(error, Exception):
            wait = 0.0  # told to end at once
        with self._record.phase("mirror"):
            self._mirror.finish(results, wait)
        if error is None:  # else the folder may not be ours any more
            prune_checkpoints(self._writer.folder, self._writer.keep_last, self._best)

    def _kept(self, writer: CheckpointWriter) -> set[int]:
        return kept_steps(writer.folder, writer.keep_last, self._best)
