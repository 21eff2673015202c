"""Going on with a run that was interrupted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from halfbyte.checkpoint.files import CheckpointState, checkpoints_in, load_checkpoint
from halfbyte.errors import RunError
from halfbyte.recipe import Recipe
from halfbyte.recipe.load import load_recipe
from halfbyte.run.assembly import Assembly
from halfbyte.run.folder import is_finished, require_run
from halfbyte.run.strategy import Strategy, read_strategy


@dataclass(frozen=True)
class Resumed:
    """The last checkpoint of a run and the recipe it was made with."""

    folder: Path
    recipe: Recipe
    state: CheckpointState
    tensors: dict[str, Tensor]
    best: dict[str, Tensor] | None  # the adapter with the lowest held-out loss so far
    strategy: Strategy | None  # None where none can be read

    def check(self, assembly: Assembly) -> None:
        """Raises RunError where the recipe, the rows or the tokenizer are not those of before."""
        if assembly.fingerprint != self.state.fingerprint:
            raise RunError(
                f"{self.folder} cannot go on: its recipe.yaml, its data file or its model's "
                "tokenizer has changed since the checkpoint; put it back or start a new run."
            )


def open_resumed(folder: Path) -> Resumed:
    """Read the last checkpoint of ``folder``.

    Raises RunError where there is no run, none to go on from, or the run has finished.
    """
    require_run(folder)
    if is_finished(folder):
        raise RunError(f"the run in {folder} has finished; there is nothing to go on with.")
    found = checkpoints_in(folder / "checkpoints")
    if not found:
        raise RunError(
            f"{folder} holds no checkpoint to go on from; start it again with --overwrite."
        )
    state, tensors = load_checkpoint(found[-1])
    best = None
    if state.best_step is not None:
        at = folder / "checkpoints" / f"step-{state.best_step}"
        best_tensors = tensors if state.best_step == state.step else load_checkpoint(at)[1]
        best = {n: t for n, t in best_tensors.items() if n.startswith("adapter.")}
    recipe = load_recipe(folder / "recipe.yaml")
    return Resumed(folder, recipe, state, tensors, best, read_strategy(folder))
