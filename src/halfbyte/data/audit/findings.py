"""All checks of the audit, and what an error among their findings does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from halfbyte.data.audit.answers import find_answers
from halfbyte.data.audit.copies import find_copies
from halfbyte.data.audit.lengths import find_lengths
from halfbyte.data.audit.private_rows import find_private_rows
from halfbyte.data.audit.subject import Subject
from halfbyte.data.audit.template_match import find_template
from halfbyte.data.audit.text_quality import find_text_quality
from halfbyte.data.audit.tokens import find_tokens
from halfbyte.errors import DataError
from halfbyte.events.types import Found

SEVERITIES = ("error", "warning", "note")


def find_all(subject: Subject) -> list[Found]:
    """The findings on ``subject``, the gravest first; errors that the recipe accepts are marked."""
    found = [
        *find_template(subject),
        *find_tokens(subject),
        *find_answers(subject),
        *find_copies(subject),
        *find_text_quality(subject),
        *find_lengths(subject),
        *find_private_rows(subject),
    ]
    accepted = set(subject.data.accept)
    marked = [
        replace(one, accepted=True) if one.severity == "error" and one.name in accepted else one
        for one in found
    ]
    return sorted(marked, key=lambda one: (one.accepted, SEVERITIES.index(one.severity)))


def refuse_errors(path: str, findings: Sequence[Found]) -> None:
    """Raise DataError if there is an error among ``findings`` that the recipe does not accept."""
    errors = [one for one in findings if one.stops]
    if not errors:
        return
    first, names = errors[0], ", ".join(one.name for one in errors)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    raise DataError(
        f"{path} would spoil the run{more}: {first.text} ({first.name}); {first.todo}, see all by "
        f"`halfbyte data`, or accept it with data.accept: [{names}]."
    )
