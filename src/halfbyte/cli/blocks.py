"""What the terminal says of an event: the words, apart from how they are laid out.

Strings may hold anything that a file or a model says; whoever prints them makes them ``visible``.

A ``Block`` is a label and the lines beside it. A terminal gets them as two columns, anything else
as plain lines that each begin with the label.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from halfbyte.cli.units import (
    bytes_text,
    count_text,
    duration_text,
    shortened,
    value_text,
    visible,
)
from halfbyte.data.example import counted
from halfbyte.events.types import (
    Audited,
    Checked,
    Choice,
    Evaluated,
    Found,
    Funnel,
    ModelLoaded,
    Noticed,
    RolledBack,
    StoppedEarly,
    TrainingStarted,
)
from halfbyte.recipe.learned import learned_words

if TYPE_CHECKING:
    from rich.text import Text

LEARNED, READ = "bold green", "dim"
# Marks of the learned text where there is no colour to tell it by.
OPEN, CLOSE = "⟦", "⟧"
# A run of the sample row longer than this loses its middle on the screen (the report has it all).
SAMPLE_RUN = 400


@dataclass(frozen=True)
class Block:
    """A label and lines that belong to it."""

    label: str
    lines: Sequence[str | Text]


def audit_block(audit: Audited) -> Block:
    """The data as it will be trained."""
    share = audit.labels / max(1, audit.tokens)
    percentiles = audit.length_percentiles
    words = {"0": "shortest", "50": "median", "90": "90 % up to", "99": "99 % up to"}
    lengths = [f"{word} {percentiles[p]:,}" for p, word in words.items() if p in percentiles]
    if "100" in percentiles:
        lengths.append(f"longest {percentiles['100']:,}")
    roles = ", ".join(
        role if role == column else f"{role} from {column!r}"
        for role, column in audit.columns.items()
    )
    lines = [
        f"{audit.source}: {audit.rows_read:,} rows read, {audit.rows_used:,} train, "
        f"{audit.rows_held_out:,} held out",
        f"shortened to {audit.max_length:,} tokens: {audit.rows_shortened:,} rows"
        + (f" (by {audit.tokens_cut:,} tokens)" if audit.tokens_cut else "")
        + f"; dropped: {_reasons(audit.rows_dropped) or 'none'}",
        *([_split(audit)] if audit.rows_split else []),
        *([f"columns: {roles}"] if roles else []),
        f"format: {audit.template}; loss on {learned_words(audit.loss_on, audit.template)}",
        f"tokens a row: {', '.join(lengths)}",
        f"{audit.tokens:,} tokens an epoch, {audit.labels:,} of them ({share:.0%}) carry loss",
    ]
    return Block("data", lines)


SEVERITY_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "dim"}


def finding_block(found: Found) -> tuple[Block, str]:
    """A finding of the audit with its rows and examples, and the style of its label."""
    from rich.text import Text

    accepted = " (accepted by the recipe)" if found.accepted else ""
    lines: list[str | Text] = [f"{found.name}{accepted}: {found.sentence}"]
    if found.rows:
        more = ", …" if found.count > len(found.rows) else ""
        colon = ":" if found.examples else ""
        lines.append(f"row{'s' if found.count > 1 else ''} {', '.join(found.places)}{more}{colon}")
    lines += [Text(visible(f"  {example}"), READ) for example in found.examples]
    return Block(found.severity, lines), SEVERITY_STYLES.get(found.severity, "")


def noticed_block(noticed: Noticed) -> tuple[Block, str]:
    """What was noticed of a step, and the style of its label."""
    todo = f"; {noticed.todo}" if noticed.action == "say" else ""
    return Block(noticed.severity, [f"{noticed.text}{todo}."]), SEVERITY_STYLES[noticed.severity]


def back_text(back: RolledBack) -> str:
    """What a batch that is left out means for the run."""
    if back.to == back.step:
        return f"step {back.step:,} is left out; it made no update"
    where = f"the checkpoint of step {back.to:,}" if back.to else "the start"
    return f"back to {where}; step {back.step:,} will be passed over, its batch left out"


def early_text(early: StoppedEarly) -> str:
    """Why the run ends before its last step."""
    times = "evaluation" if early.patience == 1 else f"{early.patience} evaluations in a row"
    lowest = ""
    if early.best_loss is not None:
        lowest = f" (lowest {early.best_loss:.4f} after step {early.best_step:,})"
    return f"ending early: {times} without a new lowest held-out loss{lowest}"


def funnel_block(funnel: Funnel, *, cut: bool) -> Block:
    """What each filter dropped or changed, with a few of the rows, ``cut`` to a line each."""
    from rich.text import Text

    width = max((len(f"{step.dropped:,}") for step in funnel.filters), default=0)
    total = len(f"{funnel.rows_in:,}")
    share = funnel.rows_out / max(1, funnel.rows_in)
    lines: list[str | Text] = [
        f"{funnel.rows_in:,} rows in, {funnel.rows_out:,} left ({share:.1%})"
    ]
    for step in funnel.filters:
        left = step.rows_in - step.dropped
        lines.append(
            f"{step.dropped:>{width},} dropped, {left:>{total},} left  {step.name}"
            + (f" ({step.settings})" if step.settings else "")
            + (f": {step.changed:,} changed" if step.changed else "")
        )
        for row in step.examples:
            place = counted(row.row, row.source)
            shown = Text(visible(f"  row {place}: {row.text}"), READ)
            if cut:
                shown.no_wrap, shown.overflow = True, "ellipsis"
            lines.append(shown)
    return Block("cleaning", lines)


def _split(audit: Audited) -> str:
    text = f"split: {audit.rows_split:,} rows into {audit.pieces:,}"
    if audit.pieces_dropped:
        text += f"; pieces with nothing to learn are left out: {audit.pieces_dropped:,}"
    return text


def _reasons(dropped: dict[str, int]) -> str:
    return ", ".join(f"{rows:,} ({reason})" for reason, rows in dropped.items() if rows)


def sample_text(audit: Audited, *, colour: bool) -> Text:
    """One row as trained, with the learned tokens told apart; marks stand in for colour."""
    from rich.text import Text

    text = Text(f"row {audit.sample_row + 1:,} as the model sees it: ")
    text.append_text(sample_legend(colour=colour)).append("\n")
    return text.append_text(row_text(audit.sample, colour=colour))


def sample_legend(*, colour: bool) -> Text:
    """What tells learned from only read."""
    from rich.text import Text

    if colour:
        return Text.assemble(("learned", LEARNED), " and ", ("only read", READ))
    return Text(f"{OPEN}learned{CLOSE} and only read")


def row_text(runs: Sequence[tuple[str, bool]], *, colour: bool) -> Text:
    """Runs of a row's text, each with whether it is learned; long ones lose their middle."""
    from rich.text import Text

    text = Text()
    for run, learned in _joined(runs):
        shown = visible(shortened(run, SAMPLE_RUN))
        if learned and not colour:
            shown = f"{OPEN}{shown}{CLOSE}"
        text.append(shown, LEARNED if learned else READ)
    text.rstrip()
    return text


def _joined(runs: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Neighbours that are alike as one; runs without text left out."""
    for learned, group in groupby((run for run in runs if run[0]), key=lambda run: run[1]):
        yield "".join(text for text, _ in group), learned


def model_block(model: ModelLoaded) -> Block:
    """The base, its bytes before and after, and where the adapter sits."""
    total = model.parameters_base + model.parameters_trainable
    copy = f"; {bytes_text(model.bytes_copy)} dequantized copy" if model.bytes_copy else ""
    per_name = ", ".join(
        name if count == model.layers else f"{name} ({count})"
        for name, count in model.lora_modules.items()
    )
    return Block(
        "model",
        [
            f"{model.name}: {model.architecture}, {model.layers} layers, read from "
            f"{model.source_format}",
            f"{count_text(model.parameters_base)} parameters frozen, "
            f"{count_text(model.parameters_trainable)} trained "
            f"({model.parameters_trainable / max(1, total):.2%})",
            f"{model.quantized_modules:,} linear layers in 4 bits: "
            f"{bytes_text(model.bytes_before)} → {bytes_text(model.bytes_after)}; the rest "
            f"{bytes_text(model.bytes_other)}{copy}",
            f"adapter on {per_name}",
        ],
    )


def resolved_block(started: TrainingStarted) -> Block:
    """What is resolved before step 1."""
    a_step = started.batch_size * started.gradient_accumulation
    packs = "" if started.packs is None else f" in {started.packs:,} packs"
    return Block(
        "training",
        [
            f"{started.rows:,} rows{packs}, {a_step:,} a step ({started.batch_size:,} at once × "
            f"{started.gradient_accumulation:,})",
            f"{started.steps:,} steps, {started.steps_per_epoch:,} an epoch, "
            f"{started.epochs:.3g} epochs",
            f"on {started.device}, in {started.precision}",
        ],
    )


def choice_value(choice: Choice) -> str:
    """The value done, and what was asked where that is another one."""
    value = value_text(choice.value)
    asked_other = choice.asked not in ("auto", None) and choice.asked != choice.value
    return f"{value} (asked: {value_text(choice.asked)})" if asked_other else value


def evaluation_text(event: Evaluated, base: float | None) -> str:
    """A held-out loss, with its distance from ``base``, the quantized base's."""
    where = {"quantized base": "before training", "base": "of the base before quantization"}
    text = f"held-out loss {where.get(event.what, f'after step {event.step:,}')}: {event.loss:.4f}"
    if event.what == "adapter" and base is not None:
        text += f", {event.loss - base:+.4f} since the start"
    return f"{text} ({duration_text(event.seconds)})"


def check_text(event: Checked) -> str:
    """A check's result in a line."""
    mark = "✓" if event.passed else "✗ FAILED:"
    return f"{mark} {event.name} ({event.detail})"
