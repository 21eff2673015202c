"""The rows of a recipe as they will be trained, without the model's weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.data.audit.lengths import Bin, histogram
from halfbyte.data.audit.sample import RowAsTrained, pieces_of
from halfbyte.data.prepare import Prepared, prepare
from halfbyte.data.source import files_of, is_pattern
from halfbyte.data.tokenize import Progress
from halfbyte.model.source import context_length, open_tokenizer
from halfbyte.recipe import Recipe
from halfbyte.run.assembly import located_recipe


@dataclass(frozen=True)
class Look:
    """What ``halfbyte data`` shows."""

    recipe: Recipe  # as asked for, with the paths as they were found
    source: str  # the data's path or paths as asked for
    prepared: Prepared
    tokenizer: Any

    @property
    def files(self) -> list[Path]:
        """The files and folders of this machine that the rows were read from."""
        data = self.recipe.data
        paths = [source.path for source in data.all_sources]
        paths += [data.held_out_path] if data.held_out_path is not None else []
        read = [files_of(path) if is_pattern(path) else [Path(path)] for path in paths]
        return [path for files in read for path in files]

    def rows(self, count: int) -> list[RowAsTrained]:
        """``count`` of the rows that train, spread evenly from the first on."""
        train, shown = self.prepared.train, []
        count = min(count, len(train))
        for at in (number * len(train) // count for number in range(count)):
            example = self.prepared.train_rows[at]
            segments = self.prepared.template.segments(example, self.recipe.data.loss_on)
            pieces = pieces_of(self.tokenizer, segments, train[at])
            shown.append(RowAsTrained(example.row, example.source, train[at].cut, pieces))
        return shown

    def lengths(self) -> list[Bin]:
        """The lengths of the rows that train, before they are cut."""
        train = self.prepared.train
        return histogram(train.lengths + train.cuts)


def look_at_data(
    recipe: Recipe, *, recipe_folder: Path | None = None, progress: Progress | None = None
) -> Look:
    """Prepare the rows as a run does, and look at every one of them.

    Paths are looked for from the working directory and then from ``recipe_folder``; ``progress``
    is :func:`prepare`'s. Raises DataError and ModelError; errors among the findings are not raised.
    """
    source, recipe = recipe.data.name, located_recipe(recipe, recipe_folder)
    tokenizer, config = open_tokenizer(recipe.model)
    prepared = prepare(recipe, tokenizer, context_length(config), thorough=True, progress=progress)
    return Look(recipe, source, prepared, tokenizer)
