"""The same prompts, answered by several models one after the other."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import halfbyte
from halfbyte.data.chat_render import ChatRender, TemplateFailed
from halfbyte.data.chat_template import own_template
from halfbyte.data.example import Example
from halfbyte.data.template import Template, make_template, reference
from halfbyte.data.text_file import sha256_of
from halfbyte.data.turns import RowRefused
from halfbyte.errors import DataError, ModelError, RunError
from halfbyte.finished.found import FoundAdapter, find_adapter, require_template
from halfbyte.finished.opened import OpenedAdapter, open_adapter
from halfbyte.finished.prompt_file import read_prompts
from halfbyte.finished.rows import held_out_rows
from halfbyte.finished.variants import BASE, FINAL, states, use_variant, variant_names
from halfbyte.generate.answer import Answer, answer
from halfbyte.model.adapter_files import WEIGHTS
from halfbyte.recipe.data_schema import DataRecipe
from halfbyte.report.side_by_side import Asked, Column, Said, SideBySide

EVERY = "all"


@dataclass(frozen=True)
class Wanted:
    """What is to be compared: variants of one adapter, or of several.

    ``variants`` are names of ``variant_names``, or ``all``; empty: everything of one adapter, and
    of several each as it was kept. ``prompts`` is a file of prompts, ``data`` one of rows; neither:
    the held-out rows of the first adapter's run.
    """

    folders: Sequence[Path]
    variants: Sequence[str] = ()
    prompts: Path | None = None
    data: str | None = None
    rows: int = 8
    seed: int = 0
    max_new_tokens: int = 256
    base: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Place:
    """One adapter and which of its variants answer, under which columns."""

    found: FoundAdapter
    variants: Sequence[str]
    columns: Sequence[Column]


@dataclass(frozen=True)
class Question:
    """A prompt before it is rendered: messages, or a row that a template renders."""

    title: str
    shown: str  # as a person reads it
    reference: str | None
    messages: Sequence[dict[str, str]] = ()
    example: Example | None = None


@dataclass(frozen=True)
class Questions:
    """Prompts and what they are called; ``texts`` where rows are texts without questions."""

    asked: Sequence[Question]
    source: str
    texts: bool = False


def find_places(wanted: Wanted) -> list[Place]:
    """The adapters that are named, and the columns that they get; no base weight is read.

    Raises RunError and ModelError where a folder holds no adapter, RunError for a variant that it
    has not.
    """
    founds = [find_adapter(folder, wanted.base) for folder in wanted.folders]
    if founds[0].run is None and wanted.prompts is None and wanted.data is None:
        raise RunError(
            f"{founds[0].folder} is no run, so it has no held-out rows to ask; name prompts with "
            "--prompts, or rows with --data."
        )
    several = len(founds) > 1
    labels = _labels([found.folder for found in founds])
    places = []
    for found, label in zip(founds, labels, strict=True):
        usual = [FINAL] if several else states(found)
        variants = _variants(found, wanted.variants) if wanted.variants else usual
        columns = []
        for variant in variants:
            name = variant
            if several:
                name = label if variant == FINAL else f"{label} {variant}"
            columns.append(Column(name, _note(found, variant), _identity(found, variant)))
        places.append(Place(found, variants, columns))
    count = sum(len(place.columns) for place in places)
    if count < 2 and several:
        raise RunError("nothing is left to compare; name more variants.")
    return places


def _variants(found: FoundAdapter, asked: Sequence[str]) -> list[str]:
    there = variant_names(found)
    for name in asked:
        if name != EVERY and name not in there:
            raise RunError(
                f"{found.folder} has no variant {name}; it has {', '.join(there)}, or all of them "
                f"by {EVERY}."
            )
    # In the order in which they came to be.
    return there if EVERY in asked else [name for name in there if name in asked]


def _labels(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder, and no two the same."""
    short = [folder.resolve().name for folder in folders]
    if len(set(short)) < len(short):
        short = [str(folder) for folder in folders]
    return [
        name if short.count(name) == 1 else f"{name} ({number})"
        for number, name in enumerate(short, 1)
    ]


def _note(found: FoundAdapter, variant: str) -> str:
    base = found.base.name.rstrip("/").rpartition("/")[2]
    if variant == BASE:
        return f"{base} in 4 bits, without an adapter"
    whose = f"run {found.folder.resolve().name}" if found.run else found.folder.resolve().name
    if variant == FINAL:
        return f"{base} with the adapter of {whose}"
    return f"{base} with the adapter of {whose} as it was at {variant.replace('-', ' ')}"


def _identity(found: FoundAdapter, variant: str) -> str:
    if variant == BASE:
        return f"base {found.base.name} {found.base.revision or ''}".rstrip()
    digest = sha256_of(found.adapter / WEIGHTS)[:32]
    return digest if variant == FINAL else f"{digest} {variant}"


def compare(
    wanted: Wanted,
    places: Sequence[Place],
    *,
    skip: Callable[[Question], bool] = lambda _: False,
    on_phase: Callable[[str], None] = lambda _: None,
    on_fallback: Callable[[str], None] | None = None,
) -> SideBySide:
    """Answers of every column of ``places`` to every prompt, greedy, one model in memory at a time.

    ``skip`` says which prompts need no answers; ``on_phase`` hears what is being done. Each adapter
    is prompted in the format that it was trained in. Raises HalfbyteError for what is wrong with
    prompts, rows or models.
    """
    questions = None if wanted.prompts is None else _typed(wanted.prompts, wanted, skip)
    answers: list[list[tuple[str, Answer]]] = []  # of each column
    for place in places:
        if questions is not None and not questions.asked:
            break
        on_phase(f"loading {place.found.base.name}")
        opened = open_adapter(place.found, device=wanted.device)
        if questions is None:
            questions = _of_rows(wanted, opened, skip)
        if questions.asked:
            prompts = render(questions, opened)
            for variant, column in zip(place.variants, place.columns, strict=True):
                on_phase(f"{column.name}: {len(prompts)} answers")
                given = _answers(opened, variant, prompts, wanted.max_new_tokens, on_fallback)
                answers.append([*zip(prompts, given, strict=True)])
        del opened
        _free()
    assert questions is not None  # there is a place
    return SideBySide(
        columns=[column for place in places for column in place.columns],
        asked=[
            Asked(
                question.title,
                question.shown,
                question.reference,
                [_said(*column[number]) for column in answers],
            )
            for number, question in enumerate(questions.asked)
        ],
        source=questions.source,
        seed=wanted.seed,
        max_new_tokens=wanted.max_new_tokens,
        made=time.time(),
        version=halfbyte.__version__,
    )


def _answers(
    opened: OpenedAdapter,
    variant: str,
    prompts: Sequence[str],
    max_new_tokens: int,
    on_fallback: Callable[[str], None] | None,
) -> list[Answer]:
    with use_variant(opened, variant):
        return answer(
            opened.model,
            opened.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            on_fallback=on_fallback,
        )


def _said(prompt: str, given: Answer) -> Said:
    return Said(given.text, given.tokens, given.ended, given.seconds, prompt)


def _free() -> None:
    """Give back what a model took before the next one comes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _typed(path: Path, wanted: Wanted, skip: Callable[[Question], bool]) -> Questions:
    """The prompts of a file, of which the seed draws some."""
    found = read_prompts(path)
    asked = []
    for place in _drawn(len(found), wanted.rows, wanted.seed):
        title, messages = found[place]
        asked.append(Question(title, _spoken(messages), None, messages))
    return Questions([one for one in asked if not skip(one)], path.name)


def _of_rows(wanted: Wanted, opened: OpenedAdapter, skip: Callable[[Question], bool]) -> Questions:
    """Held-out rows, or rows of a file, of which the seed draws some."""
    held = held_out_rows(opened.found, opened.source, data=wanted.data)
    asked = []
    for place in _drawn(len(held.rows), wanted.rows, wanted.seed):
        row = held.rows[place]
        asked.append(Question(row.at, held.template.question(row), reference(row), example=row))
    kind = "rows" if wanted.data is not None else "held-out rows"
    return Questions(
        [one for one in asked if not skip(one)],
        f"{kind} of {held.source}",
        texts=held.template.name == "text",
    )


def _spoken(messages: Sequence[dict[str, str]]) -> str:
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{one['role']}: {one['content']}" for one in messages)


def _drawn(count: int, wanted: int, seed: int) -> list[int]:
    """Places of ``wanted`` among ``count``, ascending; all where there are not more."""
    if count <= wanted:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), wanted))


def render(questions: Questions, opened: OpenedAdapter) -> list[str]:
    """The text that ``opened`` is shown for each question, in the format that it was trained in.

    Raises ModelError and DataError where that format does not take a question.
    """
    tokenizer = opened.tokenizer
    require_template(opened.found, tokenizer)
    typed = ChatRender(own_template(tokenizer) or "", tokenizer)
    prompts = []
    with _format_of(opened, questions.texts) as template:
        for question in questions.asked:
            try:
                if question.example is None:
                    prompts += typed([question.messages], generate=True)
                else:
                    prompts.append(template.prompt(question.example))
            except TemplateFailed as error:
                raise ModelError(
                    f"the chat template of {opened.folder} does not take {question.title} "
                    f"({error}); mend the template, or leave the prompt out."
                ) from error
            except RowRefused as error:
                raise DataError(
                    f"the format that {opened.folder} was trained in has no place for "
                    f"{question.title}: {error.reason}."
                ) from error
    if not all(prompt.strip() for prompt in prompts):
        raise ModelError(f"the chat template of {opened.folder} writes nothing of a prompt.")
    return prompts


@contextmanager
def _format_of(opened: OpenedAdapter, texts: bool) -> Iterator[Template]:
    """The template that the adapter was trained with, while the tokenizer has what it needs."""
    recipe, tokenizer = opened.found.recipe, opened.tokenizer
    data = DataRecipe(path="rows", template="chat") if recipe is None else recipe.data
    before: Any = tokenizer.chat_template
    if recipe is not None:
        tokenizer.chat_template = opened.source.chat_template
    try:
        yield make_template(data, tokenizer, texts=texts)[0]
    finally:
        tokenizer.chat_template = before
