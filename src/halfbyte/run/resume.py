"""Going on with a run that was interrupted, from the newest checkpoint that is whole."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from halfbyte.checkpoint.files import (
    checkpoints_in,
    load_best,
    load_checkpoint,
    remove_remains,
)
from halfbyte.checkpoint.state import CheckpointState
from halfbyte.errors import RunError
from halfbyte.events import read_events
from halfbyte.events.types import Changed, RunStarted
from halfbyte.model.weight_hashes import of_model
from halfbyte.recipe import Recipe
from halfbyte.recipe.load import load_recipe
from halfbyte.recipe.settings import get
from halfbyte.run.assembly import Assembly
from halfbyte.run.changes import Change, asks_for_more, changed_recipe
from halfbyte.run.fingerprint import DATA, HELD_OUT, TRAIN
from halfbyte.run.folder import (
    is_finished,
    refuse_links,
    remove_partial_files,
    require_run,
)
from halfbyte.run.strategy import Strategy, read_strategy

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Point:
    """A checkpoint in memory."""

    state: CheckpointState
    tensors: dict[str, Tensor]
    best: dict[str, Tensor] | None  # the adapter with the lowest held-out loss so far


@dataclass(frozen=True)
class Resumed:
    """A run that was begun, where it goes on, and with what."""

    folder: Path
    run_id: str
    recipe: Recipe
    point: Point | None  # None: no checkpoint was finished, and it begins again at step 1
    strategy: Strategy | None  # None where none can be read
    changes: list[Change]
    damaged: list[str] = field(default_factory=list)  # sentences about checkpoints passed over

    @property
    def step(self) -> int:
        """The last finished step."""
        return self.point.state.step if self.point else 0

    @property
    def begun(self) -> Path | None:
        """The run's folder, where its adapter has been trained already."""
        return self.folder if self.point else None

    def check_rows(self, assembly: Assembly) -> None:
        """Raises RunError where the rows are not those of the checkpoint."""
        if self.point is None:
            return
        then, now = self.point.state.hashes, assembly.hashes
        for rows in (TRAIN, HELD_OUT):
            if then.get(rows) == now[rows]:
                continue
            if then.get(DATA) != now.get(DATA):
                why = "the data has changed" + _hashes(then.get(DATA), now.get(DATA))
            else:
                why = "the data is the same, so it is the tokenizer, or what prepares the rows"
            raise RunError(
                f"{self.folder} cannot go on, for the {rows} are not those of its checkpoint: "
                f"{why}; put that back or start a new run."
            )

    def check_model(self, assembly: Assembly) -> None:
        """Raises RunError where the base model is not that of the checkpoint.

        Waits for the hashes of its files, which are made while these are read.
        """
        if self.point is None:
            return
        then, now = of_model(self.point.state.hashes), assembly.weights.result()
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name):
                raise RunError(
                    f"{self.folder} cannot go on, for its base model {assembly.source.name} has "
                    f"changed: {name}{_hashes(then.get(name), now.get(name))}; put that back or "
                    "start a new run."
                )


def open_resumed(
    folder: Path, *, wanted: Recipe | None = None, allow: Collection[str] = ()
) -> Resumed:
    """Read the newest whole checkpoint of ``folder``, which is this process's alone.

    ``wanted`` is the recipe to go on with; by default the one that the folder holds. Raises
    RunError where there is no run, where all its checkpoints are damaged, where the run has
    finished, and for changes of the recipe that ``allow`` does not name.
    """
    require_run(folder)
    refuse_links(folder)
    remove_remains(folder / CHECKPOINTS)
    remove_partial_files(folder)
    point, path, damaged = newest_point(folder)
    own = folder / "recipe.yaml"
    began = load_recipe(path / own.name if path is not None else own)
    consented = set(allow)
    if wanted is None and own.exists():
        wanted = load_recipe(own)
        consented |= _consented(folder, wanted)
    recipe, changes = began, list[Change]()
    if wanted is not None:
        recipe, changes = changed_recipe(folder, began, wanted, consented)
    if is_finished(folder) and not asks_for_more(changes):
        raise RunError(f"the run in {folder} has finished; there is nothing to go on with.")
    strategy = read_strategy(folder) or (None if path is None else read_strategy(path))
    run_id = point.state.run_id if point else _run_id(folder)
    return Resumed(folder, run_id, recipe, point, strategy, changes, damaged)


def newest_point(folder: Path) -> tuple[Point | None, Path | None, list[str]]:
    """The newest checkpoint that is whole, where it lies, and what is wrong with newer ones."""
    damaged: list[str] = []
    for path in reversed(checkpoints_in(folder / CHECKPOINTS)):
        try:
            state, tensors = load_checkpoint(path)
            return Point(state, tensors, load_best(path, state)), path, damaged
        except RunError as error:
            damaged.append(str(error).split("; ")[0])
    if damaged:
        raise RunError(
            f"{folder} holds no checkpoint that is whole ({'; '.join(damaged)}); start it again "
            "with --overwrite."
        )
    return None, None, damaged


def _consented(folder: Path, wanted: Recipe) -> set[str]:
    """Settings that somebody allowed to be what they are in ``wanted``, when it went on before."""
    changed = {
        record.event.key: record.event.now
        for record in read_events(folder)
        if isinstance(record.event, Changed)
    }
    return {key for key, now in changed.items() if str(get(wanted, key)) == now}


def _run_id(folder: Path) -> str:
    found = [r.event.run_id for r in read_events(folder) if isinstance(r.event, RunStarted)]
    return found[0] if found else ""


def _hashes(then: str | None, now: str | None) -> str:
    if then is None or now is None:
        return f" is {'gone' if now is None else 'new'}"
    return f" (SHA-256 {then[:8]}… then, {now[:8]}… now)"
