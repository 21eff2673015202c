"""Examples in their template: the rows that each becomes, and those that have no place in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from halfbyte.data.batch import Segment
from halfbyte.data.example import Example
from halfbyte.data.template import Template
from halfbyte.data.turns import REFUSED, RowRefused, says
from halfbyte.recipe.data_schema import LossOn

NAMED = 3  # rows of those that were refused


@dataclass
class Rendered:
    """Rows one after another, each of the example at ``places[i]``.

    An example may have several (see :meth:`Template.rows`), which then follow one another.
    ``refused`` are the errors of those that have none, by the example's place; an example without
    an answer has none either.
    """

    places: list[int] = field(default_factory=list)
    parts: list[Example] = field(default_factory=list)
    segments: list[list[Segment]] = field(default_factory=list)
    refused: dict[int, RowRefused] = field(default_factory=dict)

    def warnings(self, examples: int) -> list[str]:
        """What the user is told of rows that were refused, and of those that became several."""
        found = []
        by_reason: dict[str, list[str]] = {}
        for error in self.refused.values():
            by_reason.setdefault(error.reason, []).append(error.at)
        if by_reason:
            reason, rows = max(by_reason.items(), key=lambda item: len(item[1]))
            named = ", ".join(rows[:NAMED])
            among = "" if len(by_reason) == 1 else f", and {len(by_reason) - 1} reasons more"
            found.append(
                f"{len(self.refused):,} of {examples:,} rows are left out, such as {named}: "
                f"{reason}{among}."
            )
        made = [place for place, part in zip(self.places, self.parts, strict=True) if part.turns]
        if made:
            found.append(
                f"{len(set(made)):,} of {examples:,} conversations are trained as {len(made):,} "
                "rows: the chat template writes an earlier answer otherwise than the model gave "
                "it, so that each answer is learned where it is the last one."
            )
        return found


def answered(example: Example) -> bool:
    """Whether there is anything in an example that could be learned."""
    if example.text is not None:
        return bool(example.text.strip())
    return any(message.role == "assistant" and says(message) for message in example.messages)


def render(template: Template, examples: Iterable[Example], loss_on: LossOn) -> Rendered:
    """The rows of ``examples``, in their order.

    Raises the first RowRefused where the template refuses every example that has an answer.
    """
    found = Rendered()
    for place, example in enumerate(examples):
        if not answered(example):
            continue
        try:
            rows = template.rows(example, loss_on)
        except RowRefused as error:
            found.refused[place] = error
            continue
        for part, segments in rows:
            found.places.append(place)
            found.parts.append(part)
            found.segments.append(segments)
    if found.refused and not found.places:
        errors = list(found.refused.values())
        # What a template refuses weighs more than what a recipe does not learn.
        raise next((error for error in errors if error.kind == REFUSED), errors[0])
    return found
