"""What an evaluation found, as values and as the JSON of ``results.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.evaluate.paired import Chance
from halfbyte.evaluate.resampling import Estimate
from halfbyte.foreign_json import read_json

FORMAT = 1
FOLDER = "evaluation"
RESULTS = "results.json"
ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Figure:
    """One figure of base and adapter on the same rows.

    ``group`` is what it is of: ``answer_tokens`` (those that carry loss in training),
    ``all_tokens``, ``answers`` (those that were made) or ``choices``; ``name`` says what it is
    there. ``kind`` says how to write it: ``loss`` (nats), ``factor`` (perplexity) or ``share`` (0
    to 1). ``difference`` is adapter − base.
    """

    key: str
    name: str
    group: str
    kind: str
    lower_is_better: bool
    rows: int
    base: Estimate
    adapter: Estimate
    difference: Estimate
    chance: Chance

    @property
    def better(self) -> bool | None:
        """Whether the adapter is really better, or really worse; None where it may be chance."""
        if not self.chance.real or self.difference.value == 0:
            return None
        return (self.difference.value < 0) == self.lower_is_better


@dataclass(frozen=True)
class Wins:
    """In how many rows each model is ahead by a score; ``ties`` are equal in it."""

    key: str
    name: str
    adapter: int
    base: int
    ties: int


@dataclass(frozen=True)
class Results:
    """An evaluation: what was judged on what, how, and every figure.

    ``looks`` are by ``reference``, ``base`` and ``adapter`` the means of
    :func:`halfbyte.evaluate.looks.mean_look` and a few more; ``about`` is what was judged,
    ``settings`` what was asked for, ``versions`` those of the packages, ``notes`` sentences about
    what a reader might not expect.
    """

    about: Mapping[str, str | int | float | bool | None]
    settings: Mapping[str, str | int | float | bool | None]
    versions: Mapping[str, str]
    figures: Sequence[Figure]
    wins: Sequence[Wins] = ()
    looks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values; a figure that is no finite number is null."""
        found = {"format": FORMAT, **asdict(self)}
        for figure, written in zip(self.figures, found["figures"], strict=True):
            written["difference"]["words"] = figure.chance.words
        cleaned: dict[str, Any] = _finite(found)
        return cleaned


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float):  # numpy's are floats too
        return float(value) if math.isfinite(value) else None
    return value


def read_results(run: Path) -> Results | str | None:
    """The results in the folder of a ``run``; why they cannot be read; None where there are none.

    What a link leads to is not read.
    """
    path = run / FOLDER / RESULTS
    if path.parent.is_symlink() or path.is_symlink() or not path.exists():
        return None
    try:
        return results_of(read_json(path))
    except (OSError, ValueError) as error:
        return f"{FOLDER}/{RESULTS} cannot be read ({error})"


def results_of(value: Any) -> Results:
    """The results that :meth:`Results.as_json` wrote; whoever may have changed them since.

    Raises ValueError where they are not of that form.
    """
    try:
        if value["format"] != FORMAT:
            raise ValueError(f"it is of the format {value['format']!r}, and not {FORMAT}")
        return Results(
            about={str(k): _plain(v) for k, v in value["about"].items()},
            settings={str(k): _plain(v) for k, v in value["settings"].items()},
            versions={str(k): str(v) for k, v in value["versions"].items()},
            figures=[_figure(one) for one in value["figures"]],
            wins=[
                Wins(
                    str(w["key"]), str(w["name"]), int(w["adapter"]), int(w["base"]), int(w["ties"])
                )
                for w in value["wins"]
            ],
            looks={
                str(who): {str(k): _number(v) for k, v in looks.items()}
                for who, looks in value["looks"].items()
            },
            notes=[str(note) for note in value["notes"]],
        )
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"it is not of the form that halfbyte writes ({error!r})") from error


def _figure(one: Any) -> Figure:
    return Figure(
        key=str(one["key"]),
        name=str(one["name"]),
        group=str(one["group"]),
        kind=str(one["kind"]),
        lower_is_better=bool(one["lower_is_better"]),
        rows=int(one["rows"]),
        base=_estimate(one["base"]),
        adapter=_estimate(one["adapter"]),
        difference=_estimate(one["difference"]),
        chance=Chance(_number(one["chance"]["p"]), str(one["chance"]["test"])),
    )


def _estimate(one: Any) -> Estimate:
    low, high = one["low"], one["high"]
    return Estimate(
        _number(one["value"]),
        None if low is None else _number(low),
        None if high is None else _number(high),
    )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _plain(value: Any) -> str | int | float | bool | None:
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(value)
