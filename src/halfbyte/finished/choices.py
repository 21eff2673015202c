"""Questions with several answers to choose from: which of them a model finds the likeliest."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.data.batch import Segment, TokenizedRow
from halfbyte.data.example import Example
from halfbyte.data.source_json import read_jsonl
from halfbyte.data.template import Template
from halfbyte.data.tokenize import tokenize_rows
from halfbyte.data.turns import RowRefused
from halfbyte.errors import DataError
from halfbyte.evaluate.row_losses import row_losses
from halfbyte.model.causal import QLoRAModel

_MOST = len(string.ascii_uppercase)


@dataclass(frozen=True)
class Question:
    """A question, the answers to choose from, and the place of the right one among them.

    Where there is an ``instruction`` the question is its input, as in rows that have the two.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    instruction: str | None = None


@dataclass(frozen=True)
class Likelihoods:
    """What a model makes of the choices, an array [choices] for each question.

    ``log`` float64 is ln p(choice | prompt), ``tokens`` int64 in how many tokens.
    """

    log: list[np.ndarray]
    tokens: list[np.ndarray]

    def chosen(self, *, by_token: bool) -> np.ndarray:
        """The place of the likeliest choice of each question, int64; of equal ones the first.

        ``by_token``: the log-likelihood is divided by the choice's tokens, since a long choice is
        less likely than a short one whatever it says.
        """
        scores = [
            log / tokens if by_token else log
            for log, tokens in zip(self.log, self.tokens, strict=True)
        ]
        return np.array([int(score.argmax()) for score in scores])


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The questions of a JSONL file: ``question``, ``choices`` and ``answer`` in each line.

    ``answer`` is the right choice's place, from 0, its letter, from A, or its very text; there may
    be an ``instruction``. Raises DataError, with the row, for whatever is wrong.
    """
    try:
        if not path.is_file():
            raise DataError(f"there is no file {path} of questions with choices.")
        table = read_jsonl(path, limit)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not table.rows:
        raise DataError(f"{path} holds no questions.")
    return [
        _question(f"{path}, row {row + 1:,}", dict(table.rows[row]))
        for row in range(len(table.rows))
    ]


def _question(at: str, cells: dict[str, Any]) -> Question:
    question, choices, answer = (cells.get(name) for name in ("question", "choices", "answer"))
    instruction = cells.get("instruction")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{at}: there is no text under question.")
    if instruction is not None and not isinstance(instruction, str):
        raise DataError(f"{at}: what stands under instruction is no text.")
    whole = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
    if not isinstance(choices, list) or not whole or not 2 <= len(choices) <= _MOST:
        raise DataError(f"{at}: choices is to be a list of 2 to {_MOST} texts.")
    if len(set(choices)) < len(choices):
        raise DataError(f"{at}: two of the choices are the same text.")
    return Question(question, tuple(choices), _place(at, answer, choices), instruction)


def _place(at: str, answer: Any, choices: list[str]) -> int:
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        letter = answer.strip().rstrip(".)").upper()
        place = string.ascii_uppercase.find(letter) if len(letter) == 1 else -1
    else:
        place = answer if type(answer) is int else -1
    if not 0 <= place < len(choices):
        last = len(choices) - 1
        raise DataError(
            f"{at}: answer is to be the right choice's place, 0 to {last}, its letter, A to "
            f"{string.ascii_uppercase[last]}, or its text."
        )
    return place


def choice_rows(
    questions: Sequence[Question], template: Template, tokenizer: Any, longest: int
) -> list[TokenizedRow]:
    """Each choice of each question behind its prompt; the tokens of the choice are the labels.

    The prompt is the trained format's. In texts without questions a space follows the question.
    What ends an answer is left out, so that choices are judged by their own tokens. Raises
    DataError where a row has more than ``longest`` tokens or the format has no place for it.
    """
    segments = []
    for number, question in enumerate(questions):
        prompt = _prompt(number, question, template)
        segments += [[Segment(prompt, False), Segment(text, True)] for text in question.choices]
    rows = tokenize_rows(tokenizer, segments, range(len(segments)))
    place = 0
    for number, question in enumerate(questions):
        for row in rows[place : place + len(question.choices)]:
            if len(row) > longest:
                raise DataError(
                    f"question {number + 1:,} has {len(row):,} tokens with one of its choices, and "
                    f"the model takes {longest:,}; leave it out."
                )
            if not row.num_labels:
                raise DataError(f"a choice of question {number + 1:,} has no token of its own.")
        place += len(question.choices)
    return rows


def _prompt(number: int, question: Question, template: Template) -> str:
    asked = [text for text in (question.instruction, question.question) if text]
    if template.name == "text":
        return "\n\n".join(asked).rstrip() + " "
    places = [name for name in ("instruction", "input") if name in template.reads]
    if len(places) < 2 or len(asked) < 2:  # where there is one place, both stand there
        asked = ["\n\n".join(asked)]
    parts = dict(zip(places or ["instruction"], asked, strict=False))
    instruction, input = parts.get("instruction", ""), parts.get("input", "")
    example = Example.question_and_answer(number, instruction, input, question.choices[0])
    try:
        return template.prompt(example)
    except RowRefused as refused:
        raise DataError(
            f"the trained format has no place for question {number + 1:,}: {refused.reason}."
        ) from refused


def likelihoods(
    model: QLoRAModel,
    questions: Sequence[Question],
    rows: Sequence[TokenizedRow],
    *,
    after_batch: Callable[[int], None] = lambda rows: None,
) -> Likelihoods:
    """ln p of each choice of ``questions``, whose ``rows`` are those of :func:`choice_rows`."""
    found = row_losses(model, rows, labels_only=True, after_batch=after_batch)
    borders = np.cumsum([len(question.choices) for question in questions])[:-1]
    return Likelihoods(np.split(-found.label_loss, borders), np.split(found.labels, borders))
