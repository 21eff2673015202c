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
from halfbyte.data.cleaning.funnel import check_packages
from halfbyte.data.cleaning.stages import CLEANING, clean_read, drop_overlap
from halfbyte.data.example import Example
from halfbyte.data.fitted import Fitted, Pieces, Shown, in_runs
from halfbyte.data.long_rows import TOO_LONG, Leading
from halfbyte.data.packing import LONG_ENOUGH, good_length
from halfbyte.data.rendered import Parts, Rendered
from halfbyte.data.split import choose_held_out, mix_rows, read_split
from halfbyte.data.template import Template, make_template
from halfbyte.data.token_rows import token_rows
from halfbyte.data.tokenize import Progress
from halfbyte.data.turns import REFUSED, UNLEARNED
from halfbyte.errors import DataError
from halfbyte.events.types import Audited, Choice, Found, Funnel
from halfbyte.recipe import Recipe
from halfbyte.recipe.data_schema import DataRecipe

SHORTEST = 8  # the least that data.max_length takes


@dataclass(frozen=True)
class Prepared:
    """The rows of a run and how they came about."""

    train: Pieces  # in the order of the source; Batches shuffles them
    held_out: Pieces
    train_rows: Sequence[Example]  # aligned with train; see Template.rows
    held_out_rows: Sequence[Example]  # of held_out, which has several of one that was split
    held_out_of: np.ndarray  # the place in held_out_rows of each piece of held_out, int64
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
    where it is ``thorough``; ``progress`` is :func:`token_rows`'s. Raises DataError for whatever
    is wrong with the data, also where no row is left to train; errors among the findings are the
    caller's to refuse.
    """
    data = recipe.data
    check_packages(data.cleaning)
    read = read_split(data)
    cleaned = clean_read(data, read)
    mix_rows(data, read, recipe.seed)
    template, choices = make_template(data, tokenizer, texts=read.texts)
    whole, rendered = token_rows(data, read.rows, template, tokenizer, choices, progress)
    may_train = len(read.rows) - read.apart
    of_row = np.asarray(rendered.places)  # the place of each row's example
    lengths = whole.lengths[of_row < may_train]
    max_length = _max_length(data, lengths, model_max_length, choices)
    fitted = Fitted.of(whole, max_length, data.long_rows, Leading.of(tokenizer))
    usable = np.zeros(len(read.rows), dtype=bool)
    usable[of_row[fitted.rows[fitted.labels > 0]]] = True
    dropped = _dropped(fitted, rendered, of_row, usable)

    if not usable[:may_train].any():  # said before anything is said of held-out rows
        raise DataError(_no_rows(data, _counted(dropped, may_train), max_length))
    held_out, considered = choose_held_out(data, read, usable, recipe.seed)
    trains = usable & ~held_out
    trains[may_train:] = False
    funnel = drop_overlap(data, read, trains, held_out, cleaned)
    places = np.flatnonzero(trains)
    train_at = read.in_an_epoch(places)
    held_out_at = np.flatnonzero(held_out)
    if not len(train_at):
        raise DataError(
            f"{data.name} leaves no row to train: all of them are held out; hold out fewer."
        )
    trained = _rows_of(of_row, train_at)
    learned = fitted.learned_of(trained)
    train = Pieces(fitted, learned)
    train_rows = Parts(read.rows, rendered, fitted.rows[learned])
    held_out_rows = read.rows.among(held_out_at)
    audit = Audited(
        source=data.name,
        rows_read=considered + (cleaned.dropped if cleaned else 0),
        rows_used=len(train_at),
        rows_held_out=len(held_out_at),
        **fitted.count(trained),
        rows_dropped=dict(
            _counted(dropped, considered) + Counter({CLEANING: funnel.dropped if funnel else 0})
        ),
        template=template.name,
        loss_on=data.loss_on,
        max_length=max_length,
        tokens=int(train.lengths.sum()),
        labels=int(train.labels.sum()),
        length_percentiles=length_percentiles(whole.lengths[trained]),
        sample=sample_of(tokenizer, template.segments(train_rows[0], data.loss_on), train[0]),
        sample_row=train[0].row,
        columns=read.columns,
        sha256=read.sha256,
    )
    rows = _rows_of(of_row, places)
    findings = find_all(
        Subject(
            data=data,
            rows=Parts(read.rows, rendered, rows),
            tokenized=Shown(fitted, rows),
            held_out=held_out_rows,
            tokenizer=tokenizer,
            template=template,
            max_length=max_length,
            dropped={why: read.rows.among(at[at < considered]) for why, at in dropped.items()},
            thorough=thorough,
        )
    )
    of_held_out = fitted.learned_of(_rows_of(of_row, held_out_at))
    warnings = []
    if max_length > model_max_length:
        warnings.append(
            f"data.max_length is {max_length:,} tokens and the model was made for "
            f"{model_max_length:,}; what lies behind those trains badly."
        )
    return Prepared(
        train=train,
        held_out=Pieces(fitted, of_held_out),
        train_rows=train_rows,
        held_out_rows=held_out_rows,
        held_out_of=np.searchsorted(held_out_at, of_row[fitted.rows[of_held_out]]),
        max_length=max_length,
        template=template,
        formats=read.formats,
        audit=audit,
        choices=[*read.choices, *choices],
        warnings=[
            *read.warnings,
            *template.warnings,
            *rendered.warnings(read.rows),
            *warnings,
        ],
        findings=findings,
        funnel=funnel,
    )


def _max_length(
    data: DataRecipe, lengths: np.ndarray, model_max_length: int, choices: list[Choice]
) -> int:
    """As stated, or the 99th percentile of ``lengths``, within what the model takes.

    Packs are longer where so many tokens do not hold eight rows.
    """
    if data.max_length != "auto":
        return int(data.max_length)
    if not len(lengths):
        return min(SHORTEST, model_max_length)
    wanted = max(SHORTEST, percentile(lengths, 99))
    filled = min(good_length(int(lengths.sum()), len(lengths)), LONG_ENOUGH) if data.packing else 0
    chosen = min(max(wanted, filled), model_max_length)
    longest = f"the longest has {lengths.max():,} tokens"
    if wanted < chosen == filled:
        reason = f"packs that hold about eight rows are filled well; {longest}"
    elif chosen >= wanted:
        reason = f"99 % of the rows fit whole; {longest}"
    else:
        reason = f"the model takes no more; {longest}"
    choices.append(Choice("data.max_length", "auto", chosen, reason))
    return chosen


def _rows_of(of_row: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The tokenized rows of the examples at ``places``, in that order; int64.

    ``of_row`` int64 [rows] is the place of each row's example and ascends.
    """
    begins, ends = (np.searchsorted(of_row, places, side) for side in ("left", "right"))
    return in_runs(begins, ends - begins)


def _dropped(
    fitted: Fitted, rendered: Rendered, of_row: np.ndarray, usable: np.ndarray
) -> dict[str, np.ndarray]:
    """Reason to the places of the examples left out, int64, those before the others first."""
    made, kept = np.zeros((2, len(usable)), dtype=bool)
    made[of_row] = True
    kept[of_row[fitted.rows]] = True
    refused = rendered.kinds()
    empty = ~made
    for places in refused.values():
        empty[places] = False
    found = {
        **refused,
        EMPTY_ANSWER: np.flatnonzero(empty),
        NOTHING_LEFT: np.flatnonzero(~usable & kept),
        TOO_LONG: np.flatnonzero(made & ~kept),
    }
    left = [(why, places) for why, places in found.items() if len(places)]
    return dict(sorted(left, key=lambda item: int(item[1][0])))


def _counted(dropped: Mapping[str, np.ndarray], considered: int) -> Counter[str]:
    """How many of the first ``considered`` examples were left out, by the reason."""
    return Counter({why: int(np.count_nonzero(at < considered)) for why, at in dropped.items()})


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
