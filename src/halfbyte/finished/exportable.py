"""What is exported, and the rows that the file is compared with it by."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import halfbyte
from halfbyte.data.batch import TokenizedRow
from halfbyte.data.chat_render import ChatRender, TemplateFailed
from halfbyte.data.chat_template import own_template
from halfbyte.errors import DataError, ModelError, RunError
from halfbyte.events.log import FILE_NAME as EVENTS_FILE
from halfbyte.export.agreement import tokens_to_show
from halfbyte.export.card.text import public_name
from halfbyte.export.gguf.check import Row
from halfbyte.export.gguf.model import Described
from halfbyte.export.gguf.turn_format import trial_conversations
from halfbyte.finished.found import FoundAdapter, find_adapter, open_base
from halfbyte.finished.rows import held_out_rows
from halfbyte.generate.prompt import prompt_ids
from halfbyte.model.adapter_files import CONFIG as ADAPTER_CONFIG
from halfbyte.model.source import ModelSource, open_model
from halfbyte.recipe.schema import ModelRecipe

# Shown to both models at most: rows, and tokens of one.
_ROWS, _LONGEST = 8, 256
# Rows whose tokens are compared.
_TOKEN_ROWS = 64


@dataclass(frozen=True)
class Exportable:
    """What is exported: an adapter on its base (``found``), or a whole model."""

    folder: Path
    found: FoundAdapter | None
    source: ModelSource

    @property
    def name(self) -> str:
        recipe = self.found.recipe if self.found is not None else None
        return (recipe.title if recipe is not None else None) or self.folder.resolve().name

    @property
    def base(self) -> str | None:
        return None if self.found is None else public_name(self.found.base.name)

    @property
    def trained_on(self) -> str | None:
        """The template that the recipe names."""
        recipe = self.found.recipe if self.found is not None else None
        return None if recipe is None else recipe.data.template

    @property
    def system(self) -> str | None:
        """The system message that the recipe states."""
        recipe = self.found.recipe if self.found is not None else None
        return None if recipe is None else recipe.data.system

    def described(self) -> Described:
        by = f"halfbyte {halfbyte.__version__}"
        return Described(self.name, self.base, self.source.licence, by)


def find_exportable(folder: Path, base: str | None = None) -> Exportable:
    """The run, adapter or merged model in ``folder``. Raises RunError or ModelError."""
    adapter = (folder / EVENTS_FILE).exists() or (folder / ADAPTER_CONFIG).exists()
    if not adapter and (folder / "config.json").exists():
        if base is not None:
            raise ModelError(
                f"{folder} is a whole model, which has no base beside it; leave out --base."
            )
        return Exportable(folder, None, open_model(ModelRecipe(name=str(folder))))
    found = find_adapter(folder, base)
    return Exportable(folder, found, open_base(found))


def rows_to_compare(what: Exportable, data: str | None) -> tuple[list[Row], str, tuple[str, ...]]:
    """Rows to compare by, what to call them, and why it is these if not the run's own."""
    tokenizer = what.source.tokenizer
    found = what.found
    notes: tuple[str, ...] = ()
    if found is not None and (found.run is not None or data is not None):
        try:
            held_out = held_out_rows(found, what.source, data=data, limit=_TOKEN_ROWS)
        except (DataError, RunError) as error:
            if data is not None:
                raise
            notes = (f"compared on texts of halfbyte's own: {error}".rstrip("."),)
        else:
            loss_on = found.recipe.data.loss_on if found.recipe is not None else "answer"
            rows = []
            for example in held_out.rows:
                for _, segments in held_out.template.rows(example, loss_on):
                    text = "".join(segment.text for segment in segments)
                    rows.append(Row(text, tuple(prompt_ids(tokenizer, text))))
            _require_as_trained(rows, held_out.pieces)
            return rows[:_TOKEN_ROWS], held_out.source, ()
    elif data is not None:
        raise ModelError("--data is for the rows of an adapter, and this is a whole model.")
    talks = trial_conversations(system=False)
    template = own_template(tokenizer)
    texts = ["\n".join(m["content"] for m in talk) for talk in talks]
    if template is not None:
        with suppress(TemplateFailed):
            texts = ChatRender(template, tokenizer)(talks, generate=True)
    rows = [Row(text, tuple(prompt_ids(tokenizer, text))) for text in texts]
    return rows, "texts of halfbyte's own", notes


def _require_as_trained(rows: Sequence[Row], pieces: Sequence[TokenizedRow]) -> None:
    """The ids made here are those that the run's rows have; what is cut is left out."""
    whole = {tuple(int(i) for i in piece.input_ids) for piece in pieces if not piece.cut}
    made = {row.ids for row in rows}
    if len(whole - made) > len(whole) // 2:
        raise ModelError(
            "the adapter's tokenizer makes other tokens of its rows than the run did: the two are "
            "not of one run."
        )


def ids_to_show(rows: Sequence[Row], vocabulary: int) -> list[Tensor]:
    """Ids [T] of the first rows, so many that their logits take a bounded room."""
    budget = tokens_to_show(vocabulary)
    found = []
    for row in rows[:_ROWS]:
        ids = row.ids[: min(_LONGEST, budget // _ROWS)]
        if ids:
            found.append(torch.tensor(ids, dtype=torch.int64))
    if not found:
        raise ModelError("there is no row with a token, so the file cannot be compared.")
    return found
