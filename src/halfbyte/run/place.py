"""Which folder a run works in: a new one, a given one, or that of a run to go on with."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import RunError
from halfbyte.events.log import FILE_NAME as EVENTS_FILE
from halfbyte.recipe import Recipe
from halfbyte.recipe.load import load_recipe
from halfbyte.run.changes import asks_for_more, changed_recipe
from halfbyte.run.folder import Claimed, claim_folder, folder_name, is_finished, require_run

AUTO = "auto"


@dataclass(frozen=True)
class Place:
    """A run's folder; ``claimed`` where it is new, ``finished`` where nothing is left to do."""

    folder: Path
    claimed: Claimed | None
    finished: bool = False


def find_place(
    recipe: Recipe | None,
    *,
    out: Path | None,
    runs: Path,
    recipe_name: str,
    overwrite: bool,
    resume: Path | str | None,
    allow: Collection[str] = (),
) -> Place:
    """The folder to work in, made if it is new.

    ``resume`` is the folder of a run to go on with, or ``"auto"``: then it is ``out``, or the
    newest run of the recipe's name, if that was begun, and a new one otherwise. Raises RunError as
    ``claim_folder`` does, and where a finished run in ``out`` is of another recipe.
    """
    if resume is not None and str(resume) != AUTO:
        require_run(Path(resume))
        return Place(Path(resume), None)
    if resume is not None and recipe is not None:
        begun = out if out is not None else _newest(runs, recipe_name)
        if begun is not None and (begun / EVENTS_FILE).exists():
            if not is_finished(begun):
                return Place(begun, None)
            try:
                changed = _changes(begun, recipe, allow)
            except RunError:
                if out is not None:
                    raise
            else:
                return Place(begun, None, finished=not changed)
    claimed = claim_folder(out, runs, recipe_name, overwrite=overwrite)
    return Place(claimed.folder, claimed)


def _newest(runs: Path, recipe_name: str) -> Path | None:
    """The newest run of the name that ``claim_folder`` would give this one."""
    found = newest_name(begun_in(runs), recipe_name)
    return None if found is None else runs / found


def begun_in(runs: Path) -> list[str]:
    """The names of the folders in ``runs`` that hold a run."""
    folders = runs.iterdir() if runs.is_dir() else ()
    return [path.name for path in folders if (path / EVENTS_FILE).exists()]


def newest_name(names: Iterable[str], recipe_name: str) -> str | None:
    """The newest of the ``names`` that ``claim_folder`` would give a run of this recipe."""
    pattern = re.compile(re.escape(folder_name(recipe_name)) + r"-(\d{4}-\d{2}-\d{2})-(\d+)")
    matches = [match for name in names if (match := pattern.fullmatch(name))]
    return max(matches, key=lambda m: (m[1], int(m[2])))[0] if matches else None


def _changes(folder: Path, recipe: Recipe, allow: Collection[str]) -> bool:
    """Whether ``recipe`` asks for more steps, or another thing, than the finished run had."""
    _, changes = changed_recipe(folder, load_recipe(folder / "recipe.yaml"), recipe, allow)
    return asks_for_more(changes)
