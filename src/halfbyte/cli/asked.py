"""The recipe that a command line asks for: a file's, or one made of --model and --data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.errors import RecipeError

if TYPE_CHECKING:
    from halfbyte.recipe import Recipe


@dataclass(frozen=True)
class Asked:
    """A recipe and where it came from.

    ``name`` is for the run folder; ``text`` the file's own, None where it is not what is trained;
    ``folder`` the recipe's, beside which its paths are looked for too.
    """

    recipe: Recipe
    name: str
    text: str | None
    folder: Path | None


def asked_for(
    path: Path | None,
    *,
    model: str | None = None,
    data: str | None = None,
    overrides: Sequence[str] = (),
) -> Asked:
    """The recipe in ``path`` with ``model``, ``data`` and ``overrides`` put in, in this order.

    Without ``path`` both ``model`` and ``data`` are needed and everything else has its default.
    Raises RecipeError.
    """
    from halfbyte.recipe.load import load_recipe, parse_recipe

    if path is None:
        if model is None or data is None:
            raise RecipeError(
                "there is nothing to train; give a recipe (halfbyte train RECIPE.yaml), or both "
                "--model NAME and --data FILE."
            )
        both = json.dumps({"model": {"name": model}, "data": {"path": data}})
        recipe = parse_recipe(both, "--model and --data", overrides)
        return Asked(recipe, Path(data).stem or "run", None, None)
    given = [("model.name", model), ("data.path", data)]
    changes = [f"{key}={json.dumps(value)}" for key, value in given if value is not None]
    recipe = load_recipe(path, [*changes, *overrides])
    unchanged = not changes and not overrides
    text = path.read_text(encoding="utf-8-sig") if unchanged else None
    return Asked(recipe, path.stem, text, path.resolve().parent)
