"""Examples in their template: the rows that each becomes, and those that have no place in it."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from halfbyte.data.batch import Segment
from halfbyte.data.by_place import ByPlace
from halfbyte.data.cleaning.picked import Picked
from halfbyte.data.example import Example
from halfbyte.data.template import Template, rows_of_each
from halfbyte.data.turns import REFUSED, RowRefused, says
from halfbyte.recipe.data_schema import LossOn

NAMED = 3  # rows of those that were refused
TOLD = 1024  # examples, then how many are done is told


@dataclass
class Rendered:
    """What became of examples, in a few numbers for each.

    ``places`` has the example's place of each row, ascending: one may have several rows (see
    :meth:`Template.rows`). Of a row that is for some turns of a conversation alone, ``turns`` are
    these, as far as ``turn_ends`` of the row says, from where the row before ended. Those that have
    no row stand in ``refused``, ascending, with the number in ``reasons`` (kind, reason) of why;
    an example without an answer has no row either.
    """

    places: array[int] = field(default_factory=lambda: array("q"))
    turns: array[int] = field(default_factory=lambda: array("q"))
    turn_ends: array[int] = field(default_factory=lambda: array("q"))
    refused: array[int] = field(default_factory=lambda: array("q"))
    refused_why: array[int] = field(default_factory=lambda: array("q"))
    reasons: list[tuple[str, str]] = field(default_factory=list)

    def turns_of(self, row: int) -> tuple[int, ...] | None:
        """As :attr:`Example.turns` of what was rendered has it."""
        begin = self.turn_ends[row - 1] if row else 0
        return tuple(self.turns[begin : self.turn_ends[row]]) or None

    def kinds(self) -> dict[str, np.ndarray]:
        """Why examples were refused, and the places of those that were: int64 each, ascending."""
        refused, why = np.asarray(self.refused), np.asarray(self.refused_why)
        kinds = np.array([kind for kind, _ in self.reasons])
        return {kind: refused[kinds[why] == kind] for kind in dict.fromkeys(kinds.tolist())}

    def warnings(self, examples: Sequence[Example]) -> list[str]:
        """What the user is told of ``examples`` that were refused, or became several rows."""
        found = []
        if self.refused:
            by_reason: dict[str, list[int]] = {}
            for place, why in zip(self.refused, self.refused_why, strict=True):
                by_reason.setdefault(self.reasons[why][1], []).append(place)
            reason, places = max(by_reason.items(), key=lambda item: len(item[1]))
            named = ", ".join(examples[place].at for place in places[:NAMED])
            among = "" if len(by_reason) == 1 else f", and {len(by_reason) - 1} reasons more"
            found.append(
                f"{len(self.refused):,} of {len(examples):,} rows are left out, such as {named}: "
                f"{reason}{among}."
            )
        made = np.asarray(self.places)[np.diff(self.turn_ends, prepend=0) > 0]
        if len(made):
            found.append(
                f"{len(np.unique(made)):,} of {len(examples):,} conversations are trained as "
                f"{len(made):,} rows: the chat template writes an earlier answer otherwise than "
                "the model gave it, so that each answer is learned where it is the last one."
            )
        return found


class Parts(ByPlace[Example]):
    """Of ``examples`` what was rendered as each of ``rows`` (their numbers, int64)."""

    def __init__(self, examples: Picked, rendered: Rendered, rows: np.ndarray) -> None:
        self._examples, self._rendered = examples, rendered
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, place: int) -> Example:
        return next(self.each([place]))

    def each(self, places: Iterable[int]) -> Iterator[Example]:
        rows = self._rows[np.fromiter(places, dtype=np.int64)]
        examples = self._examples.each(map(self._rendered.places.__getitem__, rows))
        for row, example in zip(rows, examples, strict=True):
            turns = self._rendered.turns_of(row)
            if turns is None:
                yield example
            else:
                until = example.messages[: turns[-1] + 1]
                yield replace(example, messages=until, turns=turns)


def answered(example: Example) -> bool:
    """Whether there is anything in an example that could be learned."""
    if example.text is not None:
        return bool(example.text.strip())
    return any(message.role == "assistant" and says(message) for message in example.messages)


def render(
    template: Template,
    examples: Sequence[Example],
    loss_on: LossOn,
    found: Rendered,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[list[Segment], int]]:
    """The segments of each row of ``examples``, in their order, and its number in its source.

    What else is known of them is put into ``found``. Raises, at the end, the first RowRefused where
    the template refuses every example that has an answer.
    """
    first: dict[str, RowRefused] = {}
    numbers: dict[tuple[str, str], int] = {}
    asked: deque[tuple[int, int]] = deque()  # places and numbers of what is being rendered

    def wanted() -> Iterator[Example]:
        for place, example in enumerate(examples):
            if progress is not None and place and place % TOLD == 0:
                progress(place, len(examples))
            if answered(example):
                asked.append((place, example.row))
                yield example

    for rows in rows_of_each(template, wanted(), loss_on):
        place, number = asked.popleft()
        if isinstance(rows, RowRefused):
            first.setdefault(rows.kind, rows.with_traceback(None))
            why = rows.kind, rows.reason
            found.refused.append(place)
            found.refused_why.append(numbers.setdefault(why, len(numbers)))
            if len(numbers) > len(found.reasons):
                found.reasons.append(why)
            continue
        for part, segments in rows:
            found.places.append(place)
            found.turns.extend(part.turns or ())
            found.turn_ends.append(len(found.turns))
            yield segments, number
    if first and not found.places:
        # What a template refuses weighs more than what a recipe does not learn.
        raise first.get(REFUSED) or next(iter(first.values()))
