"""Cleaning among the other stages of the rows: after they are read, and once some are held out."""

from __future__ import annotations

import numpy as np

from halfbyte.data.cleaning.funnel import clean, joined
from halfbyte.data.split import Rows
from halfbyte.errors import DataError
from halfbyte.events.types import Funnel
from halfbyte.recipe.cleaning import OverlapWithHeldOut
from halfbyte.recipe.data_schema import DataRecipe

CLEANING = "cleaning"  # the reason for which the audit counts the rows that filters dropped


def clean_read(data: DataRecipe, read: Rows) -> Funnel | None:
    """Leave in ``read`` the rows that the filters of ``data`` leave; None where there are none.

    Held-out rows of a file of their own stay as they are: what is measured is not made easier.
    Those that are to be drawn from the rows, or follow them, are cleaned as the others. Filters
    that look at the held-out rows wait for ``drop_overlap``. Raises DataError where no row is left.
    """
    if not data.cleaning:
        return None
    may_train = len(read.rows) - read.apart
    stays = data.held_out_path is not None
    rows = read.rows.among(range(may_train if stays else len(read.rows)))
    left = clean(data.cleaning, rows)
    at = read.places_of(left.examples)
    trains = int(np.count_nonzero(at < may_train))
    apart = np.arange(may_train, len(read.rows)) if stays else at[trains:]
    read.apart = len(apart)
    read.keep(np.concatenate([at[:trains], apart]), left.examples)
    if may_train and not trains:
        last = max(left.funnel.filters, key=lambda step: step.dropped)
        raise DataError(
            f"{data.name} leaves no row to train: data.cleaning drops them, most by the filter "
            f"{last.name} ({last.dropped:,} of {last.rows_in:,} rows); loosen it or leave it out."
        )
    return left.funnel


def drop_overlap(
    data: DataRecipe, read: Rows, trains: np.ndarray, held_out: np.ndarray, funnel: Funnel | None
) -> Funnel | None:
    """Take from ``trains`` the rows that also stand among the held-out ones, if a filter says so.

    ``trains`` and ``held_out`` are bool [rows] over ``read.rows``; ``funnel`` is that of the
    filters before. Raises DataError where no row is left to train.
    """
    filters = [f for f in data.cleaning if isinstance(f, OverlapWithHeldOut)]
    if funnel is None or not filters:
        return funnel
    before = read.rows.among(np.flatnonzero(trains))
    others = read.rows.among(np.flatnonzero(held_out))
    cleaned = clean(filters, before, others)
    trains[:] = False
    trains[read.places_of(cleaned.examples)] = True
    if len(before) and not len(cleaned.examples):
        raise DataError(
            f"{data.name} leaves no row to train: the filter overlap_with_held_out finds each of "
            "them among the held-out rows; hold out other rows."
        )
    return joined(funnel, cleaned.funnel)
