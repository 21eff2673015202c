"""Answers of several models to the same prompts: the record on disk, and a report's part of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from halfbyte.data.audit.private import hidden
from halfbyte.errors import RunError
from halfbyte.foreign_json import read_json
from halfbyte.report import figures
from halfbyte.report.blocks import Answers, Block, Heading, Paragraph, Shown, Verbatim

FOLDER = "evaluation"
RECORD = "side_by_side.json"
PAGE = "side_by_side.html"
# Prompts that a report shows; the page has all.
MOST_PROMPTS = 8


@dataclass(frozen=True)
class Column:
    """One of the models: ``name`` as on the page, ``note`` what it is.

    ``identity`` is the same for the same weights, wherever their folder lies.
    """

    name: str
    note: str
    identity: str


@dataclass(frozen=True)
class Said:
    """One answer. ``ended``: by itself, not by the limit; ``seconds`` of its whole batch."""

    text: str
    tokens: int
    ended: bool
    seconds: float
    prompt: str  # as rendered for this model


@dataclass(frozen=True)
class Asked:
    """A prompt as a person reads it, the row's own answer if it has one, an answer a column."""

    title: str
    question: str
    reference: str | None
    answers: Sequence[Said]


@dataclass(frozen=True)
class SideBySide:
    """Prompts and answers; each of ``asked`` has as many answers as there are ``columns``."""

    columns: Sequence[Column]
    asked: Sequence[Asked]
    source: str  # what the prompts are
    seed: int  # that drew them
    max_new_tokens: int
    made: float  # unix seconds
    version: str  # of halfbyte


def to_json(seen: SideBySide) -> str:
    """All of it; :func:`read_record` reads it."""
    return json.dumps(asdict(seen), ensure_ascii=True, indent=1) + "\n"


def read_record(path: Path) -> SideBySide:
    """What ``path`` holds. Raises RunError where it cannot be read or holds something else."""
    try:
        seen = TypeAdapter(SideBySide).validate_python(read_json(path))
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        at = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise RunError(f"{path} is no record of answers side by side (see {at}).") from error
    except ValueError as error:
        raise RunError(f"{path} cannot be read as JSON: {error}.") from error
    if not seen.columns or any(len(one.answers) != len(seen.columns) for one in seen.asked):
        raise RunError(f"{path} has not an answer of each model to each prompt.")
    return seen


def read_beside(folder: Path) -> SideBySide | str | None:
    """What ``halfbyte compare`` wrote into the run's ``folder``, or why it cannot be read."""
    path = folder / FOLDER / RECORD
    if not path.exists():
        return None
    try:
        return read_record(path)
    except RunError as error:
        return str(error).replace(str(path), f"{FOLDER}/{RECORD}")


def side_by_side(seen: SideBySide | str | None) -> list[Block]:
    """A report's part on what :func:`read_beside` gave; nothing where there is nothing.

    Private data are hidden, as elsewhere in a report.
    """
    if seen is None:
        return []
    if isinstance(seen, str):
        return [Heading("Answers side by side"), Paragraph(seen)]
    names = [column.name for column in seen.columns]
    shown = seen.asked[:MOST_PROMPTS]
    said = (
        f"{figures.many(len(seen.asked), 'prompt')} of {seen.source}, answered by "
        f"{_listed(names)}, the likeliest token always, up to "
        f"{figures.many(seen.max_new_tokens, 'token')}."
    )
    cut = sum(not answer.ended for one in seen.asked for answer in one.answers)
    if cut:
        of = figures.count(len(seen.asked) * len(names))
        said += f" {figures.count(cut)} of the {of} answers were cut off there."
    if len(shown) < len(seen.asked):
        said += f" The first {len(shown)} are shown; {FOLDER}/{RECORD} holds all of them."
    blocks: list[Block] = [Heading("Answers side by side"), Paragraph(said)]
    if names == ["base", "adapter"] and all(one.reference is not None for one in shown):
        return [*blocks, Answers([_pair(one) for one in shown])]
    for one in shown:
        blocks += [Heading(one.title), Verbatim(hidden(one.question))]
        for name, answer in zip(names, one.answers, strict=True):
            blocks += [Paragraph(f"{name}{ending(answer)}:"), Verbatim(hidden(answer.text))]
        if one.reference is not None:
            blocks += [Paragraph("the row itself:"), Verbatim(hidden(one.reference))]
    return blocks


def ending(answer: Said) -> str:
    """What a reader must know of how an answer ended; nothing most often."""
    if not answer.ended:
        return f", cut off after {figures.many(answer.tokens, 'token')}"
    return "" if answer.text.strip() else ", which said nothing"


def _pair(one: Asked) -> Shown:
    before, after = one.answers
    return Shown(
        title=one.title,
        prompt=hidden(one.question),
        before=hidden(before.text),
        after=hidden(after.text),
        reference=hidden(one.reference or ""),
    )


def _listed(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
