"""Examples to tokens: rendered and tokenized by chunks, or found in the cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from halfbyte.data.chat_template import own_template, pin_dates
from halfbyte.data.cleaning.picked import Picked
from halfbyte.data.example import Example
from halfbyte.data.rendered import Rendered, render
from halfbyte.data.row_store import RowStore, RowWriter
from halfbyte.data.template import Template
from halfbyte.data.token_cache import content_key, find_rows, keep_rows
from halfbyte.data.tokenize import Progress, leading_ids, tokenized
from halfbyte.events.types import Choice
from halfbyte.recipe.data_schema import DataRecipe

# What makes texts of examples and tokens of texts, beside halfbyte itself.
PACKAGES = ("tokenizers", "transformers", "jinja2", "numpy")


def token_rows(
    data: DataRecipe,
    examples: Picked,
    template: Template,
    tokenizer: Any,
    choices: list[Choice],
    progress: Progress | None = None,
) -> tuple[RowStore, Rendered]:
    """The rows of ``examples`` as tokens, uncut, and what became of each.

    Few are in memory, many in files, which ``data.cache`` keeps for the next time; where they are
    found there, ``choices`` hears of it. ``progress`` hears how many of how many examples are
    rendered, now and then. Raises RowRefused where the template refuses every one of them.
    """
    write = partial(_write, data, examples, template, tokenizer, progress)
    if not examples.many:
        writer = RowWriter()
        rendered = write(writer)
        return writer.finish(), rendered
    key = None
    if data.cache:
        key = content_key(_made_of(data, examples, template, tokenizer))
        kept = find_rows(key)
        if kept is not None:
            choices.append(
                Choice(
                    "data.cache",
                    True,
                    f"{len(kept[0]):,} tokenized rows",
                    "the same rows were tokenized before, in the same template by the same "
                    "tokenizer",
                )
            )
            return kept
    return keep_rows(key, write)


def _write(
    data: DataRecipe,
    examples: Sequence[Example],
    template: Template,
    tokenizer: Any,
    progress: Progress | None,
    writer: RowWriter,
) -> Rendered:
    found = Rendered()
    for chunk in tokenized(tokenizer, render(template, examples, data.loss_on, found, progress)):
        writer.extend(chunk)
    return found


def _made_of(
    data: DataRecipe, examples: Picked, template: Template, tokenizer: Any
) -> Iterator[bytes]:
    """All that the tokens follow from: the examples themselves, whatever their source, too."""
    chat, _ = pin_dates(own_template(tokenizer) or "")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    yield json.dumps(
        {
            "packages": {name: version(name) for name in ("halfbyte", *PACKAGES)},
            "template": [template.name, data.template, data.instruction, data.system, chat],
            "loss_on": data.loss_on,
            "special": [repr(item) for item in sorted(tokenizer.special_tokens_map.items())],
            "leading": leading_ids(tokenizer),
            # A template that asks for the day in a way that could not be pinned.
            "day": str(date.today()) if "strftime_now" in chat else None,
        },
        sort_keys=True,
    ).encode()
    yield backend.to_str().encode()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        yield file.read_bytes()
    for place in range(len(examples)):
        yield examples.stored(place)
