"""A run's folder before there is anything to train: whose it is, and what the run goes on from."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import halfbyte
from halfbyte.errors import HalfbyteError, RunError
from halfbyte.events.types import Changed, RunStarted, Warned
from halfbyte.plan.machine import machine_mark
from halfbyte.recipe import Recipe
from halfbyte.recipe.secret_values import refuse_secrets
from halfbyte.recipe.write import dump_recipe
from halfbyte.redaction import redact
from halfbyte.run.adapter_start import save_start
from halfbyte.run.assembly import NOT_THE_SAME, Assembly
from halfbyte.run.changes import MACHINE
from halfbyte.run.folder import clear_folder, disk_failure, write_whole
from halfbyte.run.lock import RunLock
from halfbyte.run.mirroring import Mirroring, bring_back, with_mirror
from halfbyte.run.place import Place, find_place
from halfbyte.run.record import RunRecord
from halfbyte.run.resume import Resumed, open_resumed
from halfbyte.run.setup import Trainer, strategy
from halfbyte.run.strategy import FILE_NAME as STRATEGY_FILE
from halfbyte.trackers.listener import Trackers


@dataclass(frozen=True)
class Wanted:
    """What was asked of a run beside its recipe; see ``train``."""

    out: Path | None
    runs: Path
    recipe_name: str
    overwrite: bool
    resume: Path | str | None
    allow: Collection[str]
    mirror: str | None
    command: list[str]


@dataclass(frozen=True)
class Opened:
    """The recipe that a run is made with, and what it goes on from if it was begun before."""

    recipe: Recipe
    resumed: Resumed | None
    run_id: str
    trackers: Trackers

    @property
    def begun(self) -> bool:
        return self.resumed is not None

    def only_here(self, allow: Collection[str]) -> bool:
        """Whether the run must go on with the device and the versions that it began with."""
        return self.resumed is not None and self.resumed.step > 0 and MACHINE not in allow


def place_of(recipe: Recipe | None, wanted: Wanted, record: RunRecord) -> Place:
    """The folder to work in, brought back from the mirror if it is lost; as ``find_place``."""
    where = wanted.mirror if recipe is None else recipe.checkpoints.mirror
    if wanted.resume is not None and where is not None:
        bring_back(
            where,
            resume=wanted.resume,
            out=wanted.out,
            runs=wanted.runs,
            recipe_name=wanted.recipe_name,
            emit=record,
        )
    return find_place(
        recipe,
        out=wanted.out,
        runs=wanted.runs,
        recipe_name=wanted.recipe_name,
        overwrite=wanted.overwrite,
        resume=wanted.resume,
        allow=wanted.allow,
    )


def take_folder(held: ExitStack, place: Place, record: RunRecord) -> tuple[RunLock, Mirroring]:
    """Lock the folder of ``place`` and keep it for as long as ``held`` is open.

    A folder that was made for a run which never began is removed at the end.
    """
    claimed = place.claimed
    if claimed is not None:
        held.callback(lambda: None if record.opened else claimed.release())
    lock = held.enter_context(RunLock(place.folder, tell=lambda text: record(Warned(text))))
    held.callback(record.close)
    record.prepare(place.folder, ours=lambda: lock.lost is None)
    return lock, held.enter_context(Mirroring(place.folder, record))


def open_run(
    held: ExitStack, place: Place, recipe: Recipe | None, wanted: Wanted, record: RunRecord
) -> Opened:
    """Read what the run in the folder goes on from, if it was begun; tell that it begins.

    Raises RunError as ``open_resumed`` does.
    """
    resumed = None
    if place.claimed is None:
        resumed = open_resumed(place.folder, wanted=recipe, allow=wanted.allow)
        recipe = resumed.recipe
    assert recipe is not None
    recipe = with_mirror(recipe, wanted.mirror)
    refuse_secrets(recipe)
    trackers = held.enter_context(Trackers(recipe, record, tell=record.tell))
    record.listeners.append(trackers)
    run_id = resumed.run_id if resumed else secrets.token_hex(8)
    record(
        RunStarted(
            version=halfbyte.__version__,
            command=wanted.command,
            folder=str(place.folder),
            resumed_from=resumed.step if resumed else None,
            run_id=run_id,
            machine=machine_mark(),
        )
    )
    if resumed is not None:
        _tell_of_resuming(resumed, record, wanted.allow)
    return Opened(recipe, resumed, run_id, trackers)


def _tell_of_resuming(resumed: Resumed, record: RunRecord, allow: Collection[str]) -> None:
    """What is not as it was. Raises RunError where it cannot be as it was, and none has agreed."""
    for change in resumed.changes:
        record(Changed(change.key, str(change.before), str(change.now)))
    for sentence in resumed.damaged:
        record(Warned(f"{sentence}; going on from step {resumed.step:,}"))
    if resumed.point is not None and resumed.strategy is None:
        missing = f"{resumed.folder / STRATEGY_FILE}, how steps are made, cannot be read"
        if MACHINE not in allow:
            raise RunError(f"{missing}, so {NOT_THE_SAME}.")
        record(Warned(f"{missing}: it is decided anew, and sums may be rounded in other ways"))


def fill_folder(
    folder: Path, assembly: Assembly, trainer: Trainer, opened: Opened, asked: str | None
) -> None:
    """Write what the run is made from into its folder; the record of what it does comes after.

    ``asked`` is the recipe's own text, where it has one.
    """
    resumed = opened.resumed
    if resumed is None:
        clear_folder(folder)
        write_whole(folder / "recipe.asked.yaml", redact(asked or dump_recipe(opened.recipe)))
    if resumed is None or resumed.point is None:
        save_start(folder, assembly, trainer.model)
    write_whole(folder / "recipe.yaml", dump_recipe(assembly.recipe))
    if assembly.earlier is None:
        strategy(assembly, trainer).write(folder)


@contextmanager
def told_of_the_disk(folder: Path, record: RunRecord, lock: RunLock) -> Iterator[None]:
    """Turns what a disk that is full, broken or gone makes of a run into one sentence."""
    try:
        yield
    except HalfbyteError:
        raise
    except Exception as error:
        lock.check()  # what failed may have lost its folder
        failure = disk_failure(error)
        if failure is None:
            raise
        what, todo = failure
        raise RunError(
            f"the disk of {folder} {what}; {todo}"
            + (f" and go on with halfbyte train --resume {folder}." if record.opened else ".")
        ) from error
