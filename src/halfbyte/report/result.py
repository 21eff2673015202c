"""The result in plain sentences, and what it is not good for.

Each sentence holds in every case: a run that helped, did harm, was stopped, kept an early step,
held nothing out, or never made a step.
"""

from __future__ import annotations

import math

from halfbyte.events.types import Evaluated
from halfbyte.recipe.subject import is_medical
from halfbyte.report import figures
from halfbyte.report.story import Story
from halfbyte.report.verdicts import verdicts

# Below this number of held-out rows chance alone moves the loss by hundredths.
FEW_ROWS = 100


def five_sentences(story: Story) -> list[str]:
    """What was done, what came of it, what 4 bits cost, which adapter is kept, at what price."""
    return [
        _what_was_done(story),
        _held_out(story),
        _quantization(story),
        _kept(story),
        _price(story),
    ]


def reference(story: Story) -> Evaluated | None:
    """What the adapter is measured against: the base or, where it was not measured, in 4 bits."""
    return story.base or story.quantized_base


def helped(story: Story) -> bool | None:
    """Whether the adapter's held-out loss is below the base's; None where that is not known."""
    against = reference(story)
    if against is None or story.adapter_loss is None:
        return None
    return story.adapter_loss < against.loss


def limits(story: Story) -> list[str]:
    """What the result is not good for, the gravest first."""
    found: list[str] = []
    if not story.steps:
        return ["Anything: no training step was made."]
    if story.finished is None:
        found.append(
            "Being used as it is: the run has not finished, so no adapter was chosen, saved and "
            "read again."
        )
    if helped(story) is False:
        found.append(
            "Replacing the base model: on held-out rows the adapter predicts no better than "
            "the base does."
        )
    if helped(story) is None:
        found.append(
            "Any claim about new text: without a held-out loss of adapter and base there is no "
            "evidence of how it does on rows it has not seen."
        )
    if is_medical(f"{story.recipe.data.name} {story.recipe.objective or ''}"):
        found.append("Medical advice: it must not be used in place of a doctor.")
    found.append(
        "Judging truth or safety: the loss says how well the adapter predicts rows like those it "
        "was trained on, their errors included."
    )
    found.append(
        "Other subjects, languages and forms of prompt than those of the training rows: nothing "
        "here was measured on them."
    )
    against = story.adapter or reference(story)
    if against is not None and against.rows < FEW_ROWS:
        found.append(
            f"Fine comparisons: it rests on {figures.many(against.rows, 'held-out row')} and one "
            f"seed ({story.recipe.seed}), so that small differences in loss may be chance."
        )
    else:
        found.append(
            f"Statements about other runs: it is one run with one seed ({story.recipe.seed}), and "
            "another would end a little differently."
        )
    return found


def _what_was_done(story: Story) -> str:
    if not story.steps:
        return (
            f"This run made no training step with {story.model_name}, so nothing was learned and "
            "there is no adapter."
        )
    rows = "its rows"
    if story.audit is not None:
        rows = f"{figures.many(story.audit.rows_used, 'row')} of {data_name(story)}"
    done, planned = figures.count(story.last_step), figures.count(story.planned_steps)
    if story.finished is not None:
        passes = ""
        if story.plan is not None:
            share = f"{story.last_step / story.plan.steps_per_epoch:.2f}".rstrip("0").rstrip(".")
            passes = f" ({share} {'pass' if share == '1' else 'passes'} over them)"
        times = len(story.processes) - 1
        resumed = "" if not times else f", resumed {'once' if times == 1 else f'{times} times'}"
        early = ""
        if story.stopped_early is not None:
            early = f", ended before step {planned} as the held-out loss fell no more"
        return (
            f"{story.model_name} was trained on {rows} for {figures.many(story.last_step, 'step')}"
            f"{passes} in {figures.duration(story.working_seconds)}{resumed}{early}."
        )
    if story.interrupted is not None:
        return (
            f"This run is not finished: the training of {story.model_name} on {rows} was stopped "
            f"({story.interrupted.signal}) after step {done} of {planned}, and a checkpoint holds "
            "that step."
        )
    if story.diverged is not None:
        back = story.diverged.checkpoint
        return (
            f"This run is not finished: the training of {story.model_name} was stopped at step "
            f"{done} of {planned}, because {story.diverged.reason}, and "
            + (f"{back} is the last good checkpoint." if back else "there is no checkpoint.")
        )
    return (
        f"This run is not finished: the record of training {story.model_name} on {rows} breaks "
        f"off after step {done} of {planned}, because it still goes on or was cut off."
    )


def _held_out(story: Story) -> str:
    against, loss = reference(story), story.adapter_loss
    if against is None and not story.evaluations and loss is None:
        if story.audit is not None and story.audit.rows_held_out:
            return (
                "Rows were held out, but nothing was measured on them, so nothing here tells how "
                "the adapter does on text it has not seen."
            )
        return (
            "No rows were held out, so nothing here tells how the adapter does on text it has not "
            "seen, which its training loss cannot tell either."
        )
    if loss is None:
        return (
            "The adapter was not measured on the held-out rows, so nothing here tells how it does "
            "on text it has not seen."
        )
    measured = story.adapter or against
    rows = figures.many(measured.rows, "held-out row") if measured else "held-out rows"
    which = "the adapter's" if story.kept else "the adapter's latest"
    whole_row = story.audit is not None and story.audit.loss_on == "all"
    surprise = "the text of a row surprises" if whole_row else "the true answers surprise"
    beginning = (
        f"On {rows}, which took no part in training, {which} held-out loss (how much "
        f"{surprise} it; lower is better) is "
    )
    if not math.isfinite(loss):
        return f"{beginning}{figures.not_finite(loss)}, so this adapter is of no use."
    if against is None or not math.isfinite(against.loss):
        return f"{beginning}{figures.loss(loss)}, with no figure of the base to compare it with."
    base = "the base model" if story.base else "the base model in 4 bits"
    apart = loss - against.loss
    text = figures.difference(apart).lstrip("+" + figures.MINUS)
    # Training began at the base in 4 bits, so that alone tells what it did.
    start = story.quantized_base
    lowered = None if start is None else loss < start.loss
    if apart < 0:
        so = "so the training helped" if lowered else "so it predicts such rows better"
        return (
            f"{beginning}{figures.loss(loss)}, which is {text} lower than the "
            f"{figures.loss(against.loss)} of {base}, {so}."
        )
    if apart == 0:
        return f"{beginning}{figures.loss(loss)}, the same as that of {base}: it gained nothing."
    so = "the training did harm" if lowered is False else "the base is still the better model"
    return (
        f"{beginning}{figures.loss(loss)}, which is {text} higher than the "
        f"{figures.loss(against.loss)} of {base}: on such rows {so}."
    )


def _quantization(story: Story) -> str:
    base, quantized, loss = story.base, story.quantized_base, story.adapter_loss
    if quantized is None:
        return (
            "What storing the base model in 4 bits costs was not measured, since no held-out loss "
            "was taken before training."
        )
    start = quantized.loss
    if base is None:
        text = (
            "What storing the base model in 4 bits costs is not known, since it was only measured "
            f"in 4 bits ({figures.loss(start)})"
        )
        if loss is None:
            return text + "."
        return (
            f"{text}, from where training changed the loss by {figures.difference(loss - start)}."
        )
    cost = start - base.loss
    if cost > 0:
        text = (
            f"Storing the base model in 4 bits raised its loss from {figures.loss(base.loss)} to "
            f"{figures.loss(start)} before any training"
        )
    else:
        text = (
            "Storing the base model in 4 bits did not raise its loss "
            f"({figures.loss(base.loss)} before, {figures.loss(start)} after)"
        )
    if loss is None or not math.isfinite(loss):
        return text + "."
    if loss >= start:
        return f"{text}, and training did not lower it from there."
    won = figures.loss(start - loss)
    if cost <= 0:
        return f"{text}, and training lowered it by {won}."
    if loss < base.loss:
        return f"{text}, and training lowered it by {won}, more than that cost."
    return f"{text}, and training lowered it by {won}, which does not make up for that cost."


def _kept(story: Story) -> str:
    finite = [e for e in story.evaluations if math.isfinite(e.loss)]
    best = min(finite, key=lambda e: e.loss, default=None)
    kept = story.kept
    if kept is None:
        if not story.steps:
            return "No adapter was saved."
        if best is None:
            return "No adapter has been saved yet, and none was measured on held-out rows."
        return (
            "No adapter has been saved yet; the lowest held-out loss so far is "
            f"{figures.loss(best.loss)}, at step {figures.count(best.step)}."
        )
    text = (
        f"The adapter that is kept is that of step {figures.count(kept.step)} of "
        f"{figures.count(story.planned_steps)}"
    )
    if story.evaluations and best is None:
        return f"{text}, chosen blindly, since no held-out loss was a finite number."
    if best is None or story.adapter_loss is None:
        return f"{text}, the last one; whether an earlier one was better was not measured."
    if best.loss < story.adapter_loss:
        return (
            f"{text}, as the recipe asks, though step {figures.count(best.step)} had a lower "
            f"held-out loss ({figures.loss(best.loss)})."
        )
    if len(story.evaluations) == 1:
        return f"{text}, the only one whose held-out loss was measured."
    text += f", the lowest of the {len(story.evaluations)} held-out losses measured"
    last = story.evaluations[-1]
    if last.step == kept.step:
        return f"{text}, so that it was still improving when the training ended."
    return (
        f"{text}: training further did not improve it "
        f"({figures.loss(last.loss)} at step {figures.count(last.step)})."
    )


def _price(story: Story) -> str:
    found = verdicts(story)
    made = [v for v in found if v.passed is not None]
    failed = [v.name for v in made if not v.passed]
    parts = []
    if story.model is not None:
        trained = story.model.parameters_trainable
        total = trained + story.model.parameters_base
        verb = "were trained" if story.steps else "were to be trained"
        parts.append(f"{figures.percentage(trained, total)} of all parameters {verb}")
    if story.steps:
        peak = max(s.memory_bytes for s in story.steps)
        parts.append(f"the memory in use reached {figures.gib(peak)}")
    some = "all" if not failed else f"{len(made) - len(failed)} of"
    checks = f"{some} {figures.many(len(made), 'check')} passed"
    if len(found) > len(made):
        checks += f", with {len(found) - len(made)} more not applicable"
    parts.append(checks)
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}, and {parts[-1]}"
    if failed:
        text += f"; what does not hold: {'; '.join(f'“{name}”' for name in failed)}"
    return text + "."


def data_name(story: Story) -> str:
    """The data's name without the folders above it; a hub dataset's whole name."""
    source = story.audit.source if story.audit else story.recipe.data.name
    local = source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1
    known = source.lower().endswith((".json", ".jsonl", ".csv", ".tsv", ".parquet"))
    return source.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] if local or known else source
