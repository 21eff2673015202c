"""Answers that teach the wrong thing: empty, all the same, or holding their question."""

from __future__ import annotations

from collections import Counter

from halfbyte.data.audit.subject import EMPTY_ANSWER, EXAMPLES, MANY, Subject, snippet
from halfbyte.data.cleaning.duplicates import digest
from halfbyte.data.example import Example
from halfbyte.data.turns import REFUSED, UNLEARNED
from halfbyte.events.types import Found

# A question shorter than this may well begin its answer: "A spring tide is …".
LEAKED_LENGTH = 24
# An answer that all of so many rows share teaches nothing but itself; one shorter than the
# second number may be a label ("yes"), of which one is common.
SAME_ROWS, SAME_LENGTH = 5, 30
SAME_SHARE = 0.5
# In so many rows it is how the file was made, not how people write.
LEAKED_ERROR = 0.1
# Parts of a row that a template may have no place for: what they are, and what to do.
LEFT_OUT = {
    "instruction": (
        "an instruction",
        "put {instruction} into data.template, or name no column for it",
    ),
    "input": ("an input", "put {input} into data.template, or name no column for it"),
    "system": ("a system message", "take them out of the rows, or state another data.template"),
    "tools": ("tools", "take them out of the rows, or train a model whose template has them"),
    "reasoning": (
        "reasoning",
        "train a model whose template has it, or take it into the answers, in <think> and </think>",
    ),
}


def find_answers(subject: Subject) -> list[Found]:
    """Findings on what is to be learned, as text."""
    return [
        *_empty(subject),
        *_refused(subject),
        *_same(subject),
        *_leaked(subject),
        *_asked_nothing(subject),
        *_left_out(subject),
    ]


def _empty(subject: Subject) -> list[Found]:
    return subject.left_out(
        "empty-answers",
        EMPTY_ANSWER,
        "have an empty answer and are left out",
        "look whether data.columns.output names the column of the answers",
    )


def _refused(subject: Subject) -> list[Found]:
    return [
        *subject.left_out(
            "refused-rows",
            REFUSED,
            "are refused by the template and are left out",
            "read the warning that names some of them and the reason, and mend them or state "
            "another data.template",
        ),
        *subject.left_out(
            "unlearned-rows",
            UNLEARNED,
            "hold no answer that data.loss_on learns and are left out",
            "state another data.loss_on, or flag the answers that are to be learned",
        ),
    ]


def _same(subject: Subject) -> list[Found]:
    digests: list[bytes] = []  # of all answers: the texts themselves would be much
    for _, row in subject.seen():
        if row.text is None and (answer := row.answer.strip()):
            digests.append(digest(answer))
    if not digests:
        return []
    common, count = Counter(digests).most_common(1)[0]
    asked = len(digests)
    if count < SAME_ROWS or count < SAME_SHARE * asked:
        return []
    alike = count == asked
    places, answer = [], ""
    for place, row in subject.seen():
        if digest(said := row.answer.strip()) == common:
            places.append(place)
            answer = said
    if not alike and len(answer) < SAME_LENGTH:
        return []
    return [
        subject.found(
            "same-answers",
            "error" if alike else "warning",
            f"{subject.of(places)} have the very same answer",
            "look whether data.columns.output names the column of the answers"
            if alike
            else "remove most of these rows, or the model gives that answer to everything",
            places,
            [snippet(answer, 0, min(len(answer), 60))],
        )
    ]


def _leaked(subject: Subject) -> list[Found]:
    places: list[int] = []
    examples: list[str] = []
    for place, row in subject.seen():
        leaked = leaked_question(row)
        if leaked is not None:
            places.append(place)
            if len(examples) < EXAMPLES:
                examples.append(snippet(leaked, 0, 60))
    if not places:
        return []
    return [
        subject.found(
            "prompt-in-answer",
            "error" if subject.share(places) >= LEAKED_ERROR else "warning",
            f"the answers of {subject.of(places)} begin with their own question, which the model "
            "learns to repeat",
            "cut the question off the answers",
            places,
            examples,
        )
    ]


def leaked_question(row: Example) -> str | None:
    """The answer of ``row``, any of them, that begins with the question before it."""
    asked: tuple[str | None, ...] = (row.input, row.instruction)
    for message in row.messages:
        if message.role == "user":
            asked = (message.content,)
        elif message.role == "assistant":
            if any(question and _begins(message.content, question) for question in asked):
                return message.content
            asked = ()
    return None


def _begins(answer: str, question: str) -> bool:
    """Whether ``answer`` begins with ``question``, white space and case apart."""
    if len(question) < LEAKED_LENGTH:
        return False
    if question.lstrip()[:4].casefold() != answer.lstrip()[:4].casefold():
        return False  # at once, for nearly all rows
    words = " ".join(question.casefold().split())
    said = " ".join(answer[: 2 * len(question) + 64].casefold().split())
    return len(words) >= LEAKED_LENGTH and said.startswith(words)


def _asked_nothing(subject: Subject) -> list[Found]:
    reads = subject.template.reads
    places = [place for place, row in subject.seen() if row.text is None and not _asks(row, reads)]
    if not places:
        return []
    return [
        subject.found(
            "no-question",
            "warning" if subject.share(places) >= MANY else "note",
            f"{subject.of(places)} have an answer and no question",
            "look whether data.columns names the column of the questions",
            places,
        )
    ]


def _asks(row: Example, reads: frozenset[str]) -> bool:
    """Whether anything that the template shows stands before the answer."""
    if row.instruction is None and row.input is None:
        return bool(row.asked.strip())
    asked = [getattr(row, name) for name in ("instruction", "input") if name in reads]
    asked += [message.content for message in row.messages if message.role == "user"]
    return any(part and part.strip() for part in asked)


def _left_out(subject: Subject) -> list[Found]:
    found = []
    for name, (what, todo) in LEFT_OUT.items():
        if name in subject.template.reads:
            continue
        places = [place for place, row in subject.seen() if row.text is None and _has(row, name)]
        if places:
            found.append(
                subject.found(
                    "left-out",
                    "warning",
                    f"{subject.of(places)} have {what}, for which the template has no place: it "
                    "is left out",
                    todo,
                    places,
                )
            )
    return found


def _has(row: Example, part: str) -> bool:
    if part == "system":
        return any(message.role == "system" for message in row.messages)
    if part == "reasoning":
        return any(message.reasoning for message in row.messages)
    return bool(getattr(row, part))
