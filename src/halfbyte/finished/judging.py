"""An adapter judged against its base: on rows that did not train, in losses and in answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import numpy as np

import halfbyte
from halfbyte.data.example import Example
from halfbyte.data.template import reference
from halfbyte.data.text_file import sha256_of
from halfbyte.data.tokenize import whole_characters
from halfbyte.errors import DataError, ModelError
from halfbyte.evaluate.answer_scores import score_answers
from halfbyte.evaluate.bert_score import BertScorer
from halfbyte.evaluate.comparison import Measured, compare, count_wins
from halfbyte.evaluate.looks import mean_look
from halfbyte.evaluate.paired import FLIPS
from halfbyte.evaluate.resampling import LEVEL, RESAMPLES
from halfbyte.evaluate.results import Results, Wins
from halfbyte.evaluate.row_losses import RowLosses, row_losses
from halfbyte.finished.choices import Question, choice_rows, likelihoods
from halfbyte.finished.opened import OpenedAdapter
from halfbyte.finished.rows import HeldOut
from halfbyte.generate.answer import Answer, answer
from halfbyte.generate.prompt import prompt_ids
from halfbyte.model.adapter_files import WEIGHTS
from halfbyte.model.source import context_length

BASE, ADAPTER = "base", "adapter"
SCORES = {
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L F1",
    "chrf": "chrF2",
    "bert_score": "BERTScore F1",
}
# Of fewer rows a 95 % interval of a loss holds the truth in nine of ten cases and fewer
# (docs/evaluation.md).
ENOUGH_ROWS = 20
CUT_SHARE = 0.2
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "sacrebleu")

Phase = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@contextmanager
def silent(name: str) -> Iterator[Callable[[int, int], None]]:
    """A phase that nobody is told of."""
    with nullcontext():
        yield lambda done, total: None


@dataclass(frozen=True)
class Asked:
    """What is to be judged, and how.

    ``held_out``: the rows are those that the run held out, of which it is known that they did not
    train. ``max_new_tokens`` is the longest answer; with None there are none. ``bert`` computes
    BERTScore of them. ``questions`` are those with choices. ``seed`` draws resamples and flips.
    """

    held_out: bool = True
    max_new_tokens: int | None = 256
    bert: BertScorer | None = None
    questions: Sequence[Question] = ()
    seed: int = 0


@dataclass
class _Found:
    """What is known so far."""

    measured: list[Measured] = field(default_factory=list)
    wins: list[Wins] = field(default_factory=list)
    looks: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


def judge(
    opened: OpenedAdapter, held_out: HeldOut, asked: Asked, *, phase: Phase = silent
) -> tuple[Results, list[dict[str, Any]]]:
    """Every figure of ``opened`` and of its base, and for each row what was said and scored.

    The base is the same model in 4 bits with the adapter off, shown the same prompts. ``phase`` is
    entered for each part of the work and gives a function that hears how many of how many rows are
    done. Raises DataError where no row can be judged, ModelError where a loss is no number.
    """
    found = _Found()
    kept = _judge_losses(opened, held_out, found, phase)
    rows = [held_out.rows[place] for place in kept]
    if asked.max_new_tokens is not None:
        _judge_answers(opened, held_out, rows, asked, found, phase)
    figures = compare(found.measured, seed=asked.seed)
    if asked.questions:
        of_choices = _judge_choices(opened, held_out, asked.questions, found, phase)
        figures += compare(of_choices, seed=asked.seed)
    recipe = opened.found.recipe
    results = Results(
        about={
            "adapter": str(opened.folder),
            "adapter_sha256": sha256_of(opened.found.adapter / WEIGHTS),
            "base": opened.source.name,
            "data": held_out.source,
            "rows": len(rows),
            "held_out": asked.held_out,
            "questions": len(asked.questions),
            "format": held_out.template.name,
        },
        settings={
            "seed": asked.seed,
            "max_new_tokens": asked.max_new_tokens,
            "resamples": RESAMPLES,
            "confidence": LEVEL,
            "interval": "BCa bootstrap over rows",
            "flips": FLIPS,
            "device": opened.qlora.device.type,
            "precision": str(opened.qlora.compute_dtype).removeprefix("torch."),
            "bert_score": None if asked.bert is None else asked.bert.name,
            "bert_score_layer": None if asked.bert is None else asked.bert.layer,
            "block_size": None if recipe is None else recipe.quantization.block_size,
        },
        versions={"halfbyte": halfbyte.__version__, **{name: version(name) for name in PACKAGES}},
        figures=figures,
        wins=found.wins,
        looks=found.looks,
        notes=found.notes,
    )
    return results, found.rows


@contextmanager
def _as(opened: OpenedAdapter, who: str) -> Iterator[None]:
    with opened.qlora.adapter_on(who == ADAPTER):
        yield


def _both(
    hear: Callable[[int, int], None], rows: int
) -> Iterator[tuple[str, Callable[[int], None]]]:
    """Base and adapter, each with a function that hears how many of its ``rows`` are done."""
    yield BASE, lambda done: hear(done, 2 * rows)
    yield ADAPTER, lambda done: hear(rows + done, 2 * rows)


def _judge_losses(
    opened: OpenedAdapter, held_out: HeldOut, found: _Found, phase: Phase
) -> list[int]:
    """Losses and likeliest tokens; returns the places of the rows that have something to judge."""
    owner, count = np.asarray(held_out.row_of, dtype=np.int64), len(held_out.rows)
    of: dict[str, RowLosses] = {}
    with phase("loss") as hear:
        for who, tell in _both(hear, len(held_out.pieces)):
            with _as(opened, who):
                pieces = row_losses(opened.qlora, held_out.pieces, after_batch=tell)
            if not np.isfinite(pieces.loss).all():
                raise ModelError(
                    f"the {who} gives a loss that is no finite number, so that it cannot be "
                    "judged: it is broken, or overflows in this precision."
                )
            of[who] = pieces.summed(owner, count)
    base, adapter = of[BASE], of[ADAPTER]
    kept = np.flatnonzero(base.labels)
    if not len(kept):
        raise DataError(
            f"none of the {count:,} rows of {held_out.source} has an answer that can be judged."
        )
    if len(kept) < count:
        found.notes.append(
            f"{count - len(kept):,} of {count:,} rows have no answer to judge and are left out."
        )
    if len(kept) < ENOUGH_ROWS:
        found.notes.append(f"Intervals from fewer than {ENOUGH_ROWS} rows come out too narrow.")
    labels, tokens = base.labels[kept], base.tokens[kept]
    # Of texts every token is learned: the two groups would be the same.
    all_learned = bool((labels == tokens).all())
    group = "all_tokens" if all_learned else "answer_tokens"
    learned = _losses("", group, base.label_loss, adapter.label_loss, labels, kept)
    found.measured += learned
    found.measured.append(_right("", group, base.label_right, adapter.label_right, labels, kept))
    if not all_learned:
        found.measured += [
            *_losses("_all", "all_tokens", base.loss, adapter.loss, tokens, kept),
            _right("_all", "all_tokens", base.right, adapter.right, tokens, kept),
        ]
    found.wins.append(count_wins(learned[0], "lower loss"))
    places = [int(place) for place in kept]
    for at, labelled, predicted in zip(places, labels.tolist(), tokens.tolist(), strict=True):
        row = held_out.rows[at]
        written: dict[str, Any] = {
            "row": row.row,
            "source": row.source,
            "labels": labelled,
            "tokens": predicted,
        }
        for who, losses in of.items():
            written[who] = {
                "loss": float(losses.label_loss[at]) / labelled,
                "loss_all": float(losses.loss[at]) / predicted,
                "token_accuracy": int(losses.label_right[at]) / labelled,
            }
        found.rows.append(written)
    return places


def _losses(
    suffix: str,
    group: str,
    base: np.ndarray,
    adapter: np.ndarray,
    weights: np.ndarray,
    kept: np.ndarray,
) -> list[Measured]:
    """The mean loss of a token, and e to the power of it."""
    loss = Measured(
        f"loss{suffix}",
        "loss",
        group,
        base[kept],
        adapter[kept],
        weights,
        lower_is_better=True,
        kind="loss",
    )
    perplexity = replace(
        loss, key=f"perplexity{suffix}", name="perplexity", kind="factor", exponential=True
    )
    return [loss, perplexity]


def _right(
    suffix: str,
    group: str,
    base: np.ndarray,
    adapter: np.ndarray,
    weights: np.ndarray,
    kept: np.ndarray,
) -> Measured:
    """The share of tokens that are the model's likeliest."""
    key = f"token_accuracy{suffix}"
    return Measured(key, "likeliest is right", group, base[kept], adapter[kept], weights)


def _judge_answers(
    opened: OpenedAdapter,
    held_out: HeldOut,
    rows: Sequence[Example],
    asked: Asked,
    found: _Found,
    phase: Phase,
) -> None:
    """Greedy answers, how near they come to the references, and how they look."""
    assert asked.max_new_tokens is not None
    prompts = [held_out.template.prompt(row) for row in rows]
    for row, prompt in zip(rows, prompts, strict=True):
        if not prompt.strip() and not prompt_ids(opened.tokenizer, prompt):
            raise DataError(
                f"{held_out.source}, {row.at}: the prompt is empty, so that nothing can be "
                "answered; take the row out, or judge by losses alone with --no-generate."
            )
    references = [whole_characters(reference(row)) for row in rows]
    fallbacks: list[str] = []
    given: dict[str, list[Answer]] = {}
    with phase("answers") as hear:
        for who, tell in _both(hear, len(rows)):
            begun: set[int] = set()

            def on_text(row: int, _: str, begun: set[int] = begun, tell: Any = tell) -> None:
                if row not in begun:
                    begun.add(row)
                    tell(len(begun))

            with _as(opened, who):
                given[who] = answer(
                    opened.model,
                    opened.tokenizer,
                    prompts,
                    max_new_tokens=asked.max_new_tokens,
                    on_text=on_text,
                    on_fallback=fallbacks.append,
                )
    texts = {who: [one.text.strip() for one in given[who]] for who in given}
    wanted = [text.strip() for text in references]
    with phase("scores"):
        scores = {who: score_answers(texts[who], wanted) for who in texts}
        if asked.bert is not None:
            for who in texts:
                scores[who]["bert_score"] = asked.bert.f1(texts[who], wanted)
    for key in scores[BASE]:
        one = Measured(
            key,
            SCORES[key],
            "answers",
            np.array(scores[BASE][key]),
            np.array(scores[ADAPTER][key]),
            right=key == "exact_match",
        )
        found.measured.append(one)
        if key != "exact_match":
            found.wins.append(count_wins(one, f"higher {SCORES[key]}"))
    found.looks = _looks(opened.tokenizer, wanted, texts, given)
    cut = sum(one.prompt_cut > 0 for one in given[BASE])
    if cut:
        found.notes.append(
            f"{cut:,} of {len(rows):,} prompts are too long for the model and lost their beginning."
        )
    unfinished = sum(not one.ended for one in given[ADAPTER])
    if unfinished > CUT_SHARE * len(rows):
        found.notes.append(
            f"{unfinished:,} of {len(rows):,} answers of the adapter were cut off at "
            f"{asked.max_new_tokens:,} tokens, which lowers their scores; raise --max-new-tokens."
        )
    found.notes += [f"tokens were made without a CUDA graph: {why}." for why in fallbacks[:1]]
    for place, written in enumerate(found.rows):
        written |= {"prompt": prompts[place], "reference": references[place]}
        for who in given:
            one_answer = given[who][place]
            written[who] |= {
                "answer": one_answer.text,
                "answer_tokens": one_answer.tokens,
                "ended": one_answer.ended,
                **{key: values[place] for key, values in scores[who].items()},
            }


def _looks(
    tokenizer: Any,
    references: Sequence[str],
    texts: dict[str, list[str]],
    given: dict[str, list[Answer]],
) -> dict[str, dict[str, float]]:
    """How the references look, and the answers of both; ``unfinished`` is cut off by the limit."""
    looks = {"reference": mean_look(references), **{who: mean_look(texts[who]) for who in texts}}
    ids = tokenizer(list(references), add_special_tokens=False, verbose=False)["input_ids"]
    looks["reference"]["tokens"] = sum(map(len, ids)) / len(ids)
    for who, answers in given.items():
        looks[who]["tokens"] = sum(one.tokens - one.ended for one in answers) / len(answers)
        looks[who]["unfinished"] = sum(not one.ended for one in answers) / len(answers)
    return looks


def _judge_choices(
    opened: OpenedAdapter,
    held_out: HeldOut,
    questions: Sequence[Question],
    found: _Found,
    phase: Phase,
) -> list[Measured]:
    """How often the right one of a question's choices is the likeliest."""
    longest = context_length(opened.model.config)
    rows = choice_rows(questions, held_out.template, opened.tokenizer, longest)
    answers = np.array([question.answer for question in questions])
    right: dict[str, dict[bool, np.ndarray]] = {}
    with phase("choices") as hear:
        for who, tell in _both(hear, len(rows)):
            with _as(opened, who):
                likely = likelihoods(opened.qlora, questions, rows, after_batch=tell)
            right[who] = {
                by_token: (likely.chosen(by_token=by_token) == answers).astype(float)
                for by_token in (False, True)
            }
    guessed = float(np.mean([1 / len(question.choices) for question in questions]))
    found.notes.append(f"Guessing is right in {100 * guessed:.1f} % of the questions with choices.")
    return [
        Measured(key, name, "choices", right[BASE][by_token], right[ADAPTER][by_token], right=True)
        for key, name, by_token in (
            ("choices", "likeliest is right", False),
            ("choices_by_token", "… by token", True),
        )
    ]
