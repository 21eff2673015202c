"""The rows that a finished adapter is judged by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.example import Example
from halfbyte.data.prepare import Prepared, prepare
from halfbyte.data.template import Template
from halfbyte.errors import DataError, RunError
from halfbyte.events import read_events
from halfbyte.events.types import Audited
from halfbyte.finished.found import FoundAdapter, require_template
from halfbyte.model.source import ModelSource, context_length
from halfbyte.recipe import Recipe
from halfbyte.recipe.data_schema import DataRecipe

_ALL = 1 << 30  # more rows to hold out than any file has


@dataclass(frozen=True)
class HeldOut:
    """Rows that did not train, and their tokens."""

    rows: Sequence[Example]
    pieces: Sequence[TokenizedRow]  # with what is learned of them; most often one of each row
    row_of: Sequence[int]  # the place in ``rows`` of each piece
    template: (
        Template  # ``prompt(row)`` is what the model is shown, ``question(row)`` what is asked
    )
    source: str  # what the data is called


def held_out_rows(
    found: FoundAdapter,
    source: ModelSource,
    *,
    data: str | None = None,
    limit: int | None = None,
) -> HeldOut:
    """The run's own held-out rows, exactly those, or all rows of the file ``data``.

    ``source`` is what :func:`~halfbyte.finished.found.open_base` gave. Rows of ``data`` are
    rendered in the format that the run trained; for an adapter from elsewhere by its chat template.
    The first ``limit`` of them are taken. Raises RunError where the run held none out and no data
    is named, DataError where its data is no longer what it was.
    """
    if found.recipe is None:
        require_template(found, source.tokenizer)
        if data is None:
            raise RunError(
                f"{found.folder} is no run, so it has no held-out rows; name some with --data."
            )
        context = context_length(source.config)
        longest: Any = context if context < 1 << 20 else "auto"
        recipe = Recipe(model=found.base, data=DataRecipe(path=data, max_length=longest))
        trained = source.tokenizer.chat_template
    else:
        recipe, trained = found.recipe, source.chat_template
    if data is not None:
        recipe = recipe.model_copy(update={"data": _of_file(recipe.data, data, limit)})
    with _template_of(source.tokenizer, trained):
        prepared = prepare(recipe, source.tokenizer, context_length(source.config))
    if data is None:
        _require_same(found, prepared)
    if not len(prepared.held_out_rows):
        raise RunError(f"{found.folder} held no rows out; name some with --data.")
    return _first(prepared, limit, data or prepared.audit.source)


def _of_file(data: DataRecipe, path: str, limit: int | None) -> DataRecipe:
    """The data section with ``path`` alone, all of it held out; as rows to train it is unused."""
    return data.model_copy(
        update={
            "path": path,
            "sources": [],
            "cleaning": [],
            "limit": None if limit is None else max(limit, 64),
            "held_out": _ALL if limit is None else limit,
            "held_out_from": "random",
            "held_out_path": path,
            "packing": False,
        }
    )


@contextmanager
def _template_of(tokenizer: Any, template: str | None) -> Iterator[None]:
    """With ``template`` as the tokenizer's own: what a row is rendered by may have become another
    text beside the adapter, which renders the same."""
    before = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        yield
    finally:
        tokenizer.chat_template = before


def _require_same(found: FoundAdapter, prepared: Prepared) -> None:
    """The rows must be those that the run held out, or some of them may have trained."""
    assert found.run is not None
    audits = [r.event for r in read_events(found.run) if isinstance(r.event, Audited)]
    if not audits:
        return
    then, now = audits[-1], prepared.audit
    if (then.sha256, then.rows_read, then.rows_held_out) != (
        now.sha256,
        now.rows_read,
        now.rows_held_out,
    ):
        raise DataError(
            f"{now.source} is no longer what it was when {found.folder} held rows out, so that "
            "rows which trained would be taken for others; bring the file back, or name other rows "
            "with --data."
        )


def _first(prepared: Prepared, limit: int | None, source: str) -> HeldOut:
    rows = prepared.held_out_rows
    count = len(rows) if limit is None else min(limit, len(rows))
    kept = np.asarray(prepared.held_out_of) < count
    return HeldOut(
        rows=[rows[place] for place in range(count)],
        pieces=[*compress(prepared.held_out, kept)],
        row_of=prepared.held_out_of[kept].tolist(),
        template=prepared.template,
        source=Path(source).name if Path(source).is_absolute() else source,
    )
