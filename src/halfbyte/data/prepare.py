"""From the recipe's data section to rows of tokens."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from halfbyte.data.audit.findings import find_all
from halfbyte.data.audit.lengths import length_percentiles, percentile
from halfbyte.data.audit.sample import sample_of
from halfbyte.data.audit.subject import EMPTY_ANSWER, NOTHING_LEFT, Subject
from halfbyte.data.batch import TokenizedRow
from halfbyte.data.cleaning.funnel import check_packages
from halfbyte.data.cleaning.stages import CLEANING, clean_read, drop_overlap
from halfbyte.data.example import Example
from halfbyte.data.long_rows import TOO_LONG, Fitted, Leading, count_fitted
from halfbyte.data.packing import LONG_ENOUGH, good_length
from halfbyte.data.rendered import Rendered, render
from halfbyte.data.split import choose_held_out, mix_rows, read_split
from halfbyte.data.template import Template, make_template
from halfbyte.data.tokenize import Progress, tokenize_rows
from halfbyte.data.turns import REFUSED, UNLEARNED
from halfbyte.errors import DataError
from halfbyte.events.types import Audited, Choice, Found, Funnel
from halfbyte.recipe import Recipe
from halfbyte.recipe.data_schema import DataRecipe

SHORTEST = 8  # the least that data.max_length takes


@dataclass(frozen=True)
class Prepared:
    """The rows of a run and how they came about."""

    train: list[TokenizedRow]  # in the order of the source; Batches shuffles them
    held_out: list[TokenizedRow]
    train_rows: list[Example]  # aligned with train; see Template.rows
    held_out_rows: list[Example]  # of held_out, which has several of one that was split
    max_length: int
    template: Template
    formats: list[str]  # of the sources, in their order
    audit: Audited
    choices: list[Choice]
    warnings: list[str]
    findings: list[Found]
    funnel: Funnel | None = None  # of the filters that the recipe lists


@contextmanager
def _uncollected() -> Iterator[None]:
    """No look for reference cycles among rows, which have none: an eighth of the time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


@_uncollected()
def prepare(
    recipe: Recipe,
    tokenizer: Any,
    model_max_length: int,
    *,
    thorough: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Read, render, tokenize, cut, split and audit the rows of ``recipe.data``.

    ``model_max_length`` is in tokens. Rows are held out after those with nothing to learn are
    dropped and the maximum length is known, so that the effective recipe, with both numbers
    stated, gives the same rows. The audit looks at some rows for what takes time, at all of them
    where it is ``thorough``; ``progress`` is :func:`tokenize_rows`'s. Raises DataError for whatever
    is wrong with the data, also where no row is left to train; errors among the findings are the
    caller's to refuse.
    """
    data = recipe.data
    check_packages(data.cleaning)
    read = read_split(data)
    cleaned = clean_read(data, read)
    mix_rows(data, read, recipe.seed)
    template, choices = make_template(data, tokenizer, texts=read.texts)
    rendered = render(template, read.rows, data.loss_on)
    numbers = [part.row for part in rendered.parts]
    whole = tokenize_rows(tokenizer, rendered.segments, numbers, progress)
    rendered.segments.clear()  # their texts, once more than the examples have them
    may_train = len(read.rows) - read.apart
    lengths = [len(row) for i, row in zip(rendered.places, whole, strict=True) if i < may_train]
    max_length = _max_length(data, lengths, model_max_length, choices)
    leading = Leading.of(tokenizer)
    rows: dict[int, list[tuple[Example, Fitted]]] = {}
    for i, part, row in zip(rendered.places, rendered.parts, whole, strict=True):
        fitted = Fitted.of(row, max_length, data.long_rows, leading)
        rows.setdefault(i, []).append((part, fitted))
    usable = np.zeros(len(read.rows), dtype=bool)
    usable[[i for i, parts in rows.items() if any(row.learned for _, row in parts)]] = True
    dropped = _dropped(rows, rendered, usable)

    if not usable[:may_train].any():  # said before anything is said of held-out rows
        raise DataError(_no_rows(data, _counted(dropped, may_train), max_length))
    held_out, considered = choose_held_out(data, read, usable, recipe.seed)
    trains = usable & ~held_out
    trains[may_train:] = False
    funnel = drop_overlap(data, read, trains, held_out, cleaned)
    places = np.flatnonzero(trains)
    train_at = read.in_an_epoch(places).tolist()
    held_out_at = np.flatnonzero(held_out).tolist()
    if not train_at:
        raise DataError(
            f"{data.name} leaves no row to train: all of them are held out; hold out fewer."
        )
    trained = [one for i in train_at for one in rows[i]]
    train = [piece for _, row in trained for piece in row.learned]
    train_rows = [part for part, row in trained for _ in row.learned]
    held_out_rows = [read.rows[i] for i in held_out_at]
    audit = Audited(
        source=data.name,
        rows_read=considered + (cleaned.dropped if cleaned else 0),
        rows_used=len(train_at),
        rows_held_out=len(held_out_at),
        **count_fitted([row for _, row in trained]),
        rows_dropped=dict(
            _counted(dropped, considered) + Counter({CLEANING: funnel.dropped if funnel else 0})
        ),
        template=template.name,
        loss_on=data.loss_on,
        max_length=max_length,
        tokens=sum(map(len, train)),
        labels=sum(row.num_labels for row in train),
        length_percentiles=length_percentiles([len(row.whole) for _, row in trained]),
        sample=sample_of(tokenizer, template.segments(train_rows[0], data.loss_on), train[0]),
        sample_row=train[0].row,
        columns=read.columns,
        sha256=read.sha256,
    )
    findings = find_all(
        Subject(
            data=data,
            rows=[part for i in places.tolist() for part, _ in rows[i]],
            tokenized=[row.shown for i in places.tolist() for _, row in rows[i]],
            held_out=held_out_rows,
            tokenizer=tokenizer,
            template=template,
            max_length=max_length,
            dropped={
                why: [read.rows[i].row for i in at if i < considered] for why, at in dropped.items()
            },
            thorough=thorough,
        )
    )
    warnings = []
    if max_length > model_max_length:
        warnings.append(
            f"data.max_length is {max_length:,} tokens and the model was made for "
            f"{model_max_length:,}; what lies behind those trains badly."
        )
    return Prepared(
        train=train,
        held_out=[piece for i in held_out_at for _, row in rows[i] for piece in row.learned],
        train_rows=train_rows,
        held_out_rows=held_out_rows,
        max_length=max_length,
        template=template,
        formats=read.formats,
        audit=audit,
        choices=[*read.choices, *choices],
        warnings=[
            *read.warnings,
            *template.warnings,
            *rendered.warnings(len(read.rows)),
            *warnings,
        ],
        findings=findings,
        funnel=funnel,
    )


def _max_length(
    data: DataRecipe, lengths: Sequence[int], model_max_length: int, choices: list[Choice]
) -> int:
    """As stated, or the 99th percentile of ``lengths``, within what the model takes.

    Packs are longer where so many tokens do not hold eight rows.
    """
    if data.max_length != "auto":
        return int(data.max_length)
    if not lengths:
        return min(SHORTEST, model_max_length)
    wanted = max(SHORTEST, percentile(lengths, 99))
    filled = min(good_length(sum(lengths), len(lengths)), LONG_ENOUGH) if data.packing else 0
    chosen = min(max(wanted, filled), model_max_length)
    longest = f"the longest has {max(lengths):,} tokens"
    if wanted < chosen == filled:
        reason = f"packs that hold about eight rows are filled well; {longest}"
    elif chosen >= wanted:
        reason = f"99 % of the rows fit whole; {longest}"
    else:
        reason = f"the model takes no more; {longest}"
    choices.append(Choice("data.max_length", "auto", chosen, reason))
    return chosen


def _dropped(
    rows: Mapping[int, Sequence[tuple[Example, Fitted]]], rendered: Rendered, usable: np.ndarray
) -> dict[str, list[int]]:
    """Reason to the places of the examples left out; those that were rendered are in ``rows``."""
    dropped: dict[str, list[int]] = {}
    for i in np.flatnonzero(~usable).tolist():
        if i in rendered.refused:
            why = rendered.refused[i].kind
        elif i not in rows:
            why = EMPTY_ANSWER
        else:
            why = NOTHING_LEFT if any(row.pieces for _, row in rows[i]) else TOO_LONG
        dropped.setdefault(why, []).append(i)
    return dropped


def _counted(dropped: Mapping[str, Sequence[int]], considered: int) -> Counter[str]:
    """How many of the first ``considered`` examples were left out, by the reason."""
    return Counter({why: sum(i < considered for i in at) for why, at in dropped.items()})


def _no_rows(data: DataRecipe, dropped: Counter[str], max_length: int) -> str:
    count = sum(dropped.values())
    reason, number = dropped.most_common(1)[0]
    have, todo = {
        EMPTY_ANSWER: (
            "have an",
            "look whether data.columns.output names the column of the answers",
        ),
        REFUSED: ("are", "state another data.template"),
        UNLEARNED: ("have", "state another data.loss_on"),
    }.get(reason, ("have", f"raise data.max_length, which is {max_length:,} tokens"))
    return (
        f"{data.name} leaves no row to train: {number:,} of {count:,} rows {have} {reason}; {todo}."
    )
