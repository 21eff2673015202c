"""From the recipe's data section to rows of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
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
from halfbyte.data.split import choose_held_out, mix_rows, read_split
from halfbyte.data.template import Template, make_template
from halfbyte.data.tokenize import tokenize_rows
from halfbyte.errors import DataError
from halfbyte.events.types import Audited, Choice, Found, Funnel
from halfbyte.recipe import Recipe
from halfbyte.recipe.schema import DataRecipe

SHORTEST = 8  # the least that data.max_length takes


@dataclass(frozen=True)
class Prepared:
    """The rows of a run and how they came about."""

    train: list[TokenizedRow]  # in the order of the source; Batches shuffles them
    held_out: list[TokenizedRow]
    train_rows: list[Example]  # aligned with train
    held_out_rows: list[Example]  # of held_out, which has several of one that was split
    max_length: int
    template: Template
    audit: Audited
    choices: list[Choice]
    warnings: list[str]
    findings: list[Found]
    funnel: Funnel | None = None  # of the filters that the recipe lists


def prepare(
    recipe: Recipe, tokenizer: Any, model_max_length: int, *, thorough: bool = False
) -> Prepared:
    """Read, render, tokenize, cut, split and audit the rows of ``recipe.data``.

    ``model_max_length`` is in tokens. Rows are held out after those with nothing to learn are
    dropped and the maximum length is known, so that the effective recipe, with both numbers
    stated, gives the same rows. The audit looks at some rows for what takes time, at all of them
    where it is ``thorough``. Raises DataError for whatever is wrong with the data, also where no
    row is left to train; errors among the findings are the caller's to refuse.
    """
    data = recipe.data
    check_packages(data.cleaning)
    read = read_split(data)
    cleaned = clean_read(data, read)
    mix_rows(data, read, recipe.seed)
    template, choices = make_template(data, tokenizer, texts=read.texts)
    answered = [i for i, row in enumerate(read.rows) if row.answer.strip()]
    rendered = [template.segments(read.rows[i], data.loss_on) for i in answered]
    whole = tokenize_rows(tokenizer, rendered, [read.rows[i].row for i in answered])
    may_train = len(read.rows) - read.apart
    lengths = [len(row) for i, row in zip(answered, whole, strict=True) if i < may_train]
    max_length = _max_length(data, lengths, model_max_length, choices)
    leading = Leading.of(tokenizer)
    rows = {
        i: Fitted.of(row, max_length, data.long_rows, leading)
        for i, row in zip(answered, whole, strict=True)
    }
    usable = np.zeros(len(read.rows), dtype=bool)
    usable[[i for i, row in rows.items() if row.learned]] = True

    if not usable[:may_train].any():  # said before anything is said of held-out rows
        raise DataError(_no_rows(data, _counted(_dropped(rows, usable, may_train)), max_length))
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
    train = [piece for i in train_at for piece in rows[i].learned]
    train_rows = [read.rows[i] for i in train_at for _ in rows[i].learned]
    held_out_rows = [read.rows[i] for i in held_out_at]
    dropped = _dropped(rows, usable, considered)
    audit = Audited(
        source=data.name,
        rows_read=considered + (cleaned.dropped if cleaned else 0),
        rows_used=len(train_at),
        rows_held_out=len(held_out_at),
        **count_fitted([rows[i] for i in train_at]),
        rows_dropped=dict(_counted(dropped) + Counter({CLEANING: funnel.dropped if funnel else 0})),
        template=template.name,
        loss_on=data.loss_on,
        max_length=max_length,
        tokens=sum(map(len, train)),
        labels=sum(row.num_labels for row in train),
        length_percentiles=length_percentiles([len(rows[i].whole) for i in train_at]),
        sample=sample_of(tokenizer, template.segments(train_rows[0], data.loss_on), train[0]),
        sample_row=train[0].row,
        columns=read.columns,
        sha256=read.sha256,
    )
    findings = find_all(
        Subject(
            data=data,
            rows=[read.rows[i] for i in places.tolist()],
            tokenized=[rows[i].shown for i in places.tolist()],
            held_out=held_out_rows,
            tokenizer=tokenizer,
            template=template,
            max_length=max_length,
            dropped={why: [read.rows[i].row for i in at] for why, at in dropped.items()},
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
        held_out=[piece for i in held_out_at for piece in rows[i].learned],
        train_rows=train_rows,
        held_out_rows=held_out_rows,
        max_length=max_length,
        template=template,
        audit=audit,
        choices=[*read.choices, *choices],
        warnings=[*read.warnings, *template.warnings, *warnings],
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
    rows: Mapping[int, Fitted], usable: np.ndarray, considered: int
) -> dict[str, list[int]]:
    """Reason to the places of the rows left out; those with an answer are in ``rows``."""
    dropped: dict[str, list[int]] = {}
    for i in np.flatnonzero(~usable[:considered]).tolist():
        dropped.setdefault(_why(rows.get(i)), []).append(i)
    return dropped


def _why(row: Fitted | None) -> str:
    if row is None:
        return EMPTY_ANSWER
    return NOTHING_LEFT if row.pieces else TOO_LONG


def _counted(dropped: Mapping[str, Sequence[int]]) -> Counter[str]:
    return Counter({reason: len(places) for reason, places in dropped.items()})


def _no_rows(data: DataRecipe, dropped: Counter[str], max_length: int) -> str:
    count = sum(dropped.values())
    reason, number = dropped.most_common(1)[0]
    if reason == EMPTY_ANSWER:
        todo = "look whether data.columns.output names the column of the answers"
    else:
        todo = f"raise data.max_length, which is {max_length:,} tokens"
    return (
        f"{data.name} leaves no row to train: {number:,} of {count:,} rows have "
        f"{'an ' if reason == EMPTY_ANSWER else ''}{reason}; {todo}."
    )
