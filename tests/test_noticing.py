"""What is noticed of losses and gradients, and what is not: by made-up and by recorded losses."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfbyte import Recipe
from halfbyte.engine.scaler import LossScaler
from halfbyte.errors import RunError
from halfbyte.events.types import Noticed
from halfbyte.loop.steps import FinishedStep
from halfbyte.recipe.watch_schema import EarlyStoppingRecipe, WatchRecipe
from halfbyte.run.divergence import SkippedSteps, named_rows
from halfbyte.run.reacting import Reactions
from halfbyte.run.record import RunRecord
from halfbyte.watching.early_stopping import EarlyStopping
from halfbyte.watching.interventions import Interventions
from halfbyte.watching.noticing import Noticing, span_of
from halfbyte.watching.spikes import LossSpikes

# Losses of SmolLM2-135M on ChatDoctor rows, one row a step: as noisy as a run can be.
RECORDED: list[float] = json.loads(
    (Path(__file__).parent / "recorded_losses.json").read_text(encoding="utf-8")
)["losses"]


def told(number: int, loss: float, **more: Any) -> FinishedStep:
    step = FinishedStep(number, loss, 0.5, True, 100, 40, 0.1, (3, 8))
    return dataclasses.replace(step, **more)


def noticing(clip: float = 1.0, span: int = 60, scaled: bool = False, **actions: Any) -> Noticing:
    return Noticing(
        WatchRecipe(**actions),
        clip=clip,
        span=span,
        scaled=scaled,
        name_rows=lambda step: named_rows(step.rows),
    )


def names(found: Sequence[Noticed]) -> list[tuple[str, int]]:
    return [(one.name, one.step) for one in found]


def watched(watch: Noticing, steps: Sequence[FinishedStep]) -> list[tuple[str, int]]:
    return names([one for step in steps for one in watch.step(step)])


def falling(count: int, noise: Callable[[np.random.Generator, int], np.ndarray], seed: int) -> Any:
    """A fall from 2.9 to 1.4 within a few, or a hundred, steps, and noise that multiplies it."""
    chance = np.random.default_rng(seed)
    within = chance.choice([5, 20, 60])
    return (1.4 + 1.5 * np.exp(-np.arange(count) / within)) * noise(chance, count)


ORDINARY: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "many rows a step": lambda chance, n: 1 + 0.05 * chance.standard_normal(n),
    "few rows a step": lambda chance, n: np.exp(0.2 * chance.standard_normal(n)),
    "one row a step": lambda chance, n: np.exp(0.4 * chance.standard_normal(n)),
    "long tail": lambda chance, n: chance.gamma(2, 0.5, n),
}


@pytest.mark.parametrize("noise", ORDINARY)
def test_an_ordinary_run_has_no_spike(noise: str) -> None:
    """Less than one in 10,000 steps, in the first hundred steps and later on."""
    found = 0
    lengths = [120] * 100 + [3_000]
    for seed, count in enumerate(lengths):
        spikes = LossSpikes()
        found += sum(
            spikes.take(loss) is not None for loss in falling(count, ORDINARY[noise], seed).tolist()
        )
    assert found <= sum(lengths) / 10_000


@pytest.mark.parametrize(
    ("noise", "times"),
    [("many rows a step", 1.75), ("few rows a step", 6.0), ("one row a step", 20.0)],
)
def test_a_step_far_above_the_others_is_a_spike(noise: str, times: float) -> None:
    for seed in range(20):
        losses = falling(120, ORDINARY[noise], seed)
        losses[100] *= times
        spikes = LossSpikes()
        found = [i for i, loss in enumerate(losses.tolist()) if spikes.take(loss) is not None]
        assert found == [100]


def test_recorded_losses() -> None:
    assert len(RECORDED) >= 400
    numbers = range(1, len(RECORDED) + 1)
    steps = [told(number, loss) for number, loss in zip(numbers, RECORDED, strict=True)]
    assert watched(noticing(span=span_of(1, 18)), steps) == []
    # What a step of rows without sense, or a weight thrown far off, gives.
    for at in (40, 200, 333):
        spoiled = [*steps]
        spoiled[at - 1] = told(at, 11.5)
        assert watched(noticing(span=span_of(1, 18)), spoiled) == [("loss_spike", at)]
    # Where there is nothing to learn, the same losses come in any order.
    order = np.random.default_rng(1).permutation(len(steps))
    flat = [told(n, RECORDED[int(i)] + 0.001 * n) for n, i in enumerate(order, 1)]
    assert ("no_learning", 300) in watched(noticing(span=300), flat)


def slow_spike(losses: list[float]) -> bool:
    """The bounds as docs/watching.md has them, of the whole past."""
    past = np.array(losses)
    usual = np.array([np.median(past[max(0, i - 15) : i]) for i in range(5, len(past))])
    distances = past[5:] - usual
    if len(distances) < 16:
        return False
    known, distance = distances[:-1][-100:], distances[-1]
    deviation = 1.4826 * np.median(np.abs(known - np.median(known)))
    tenth = (np.sort(known)[(9 * (len(known) - 1)) // 10] - np.median(known)) / 1.2816
    spread = max(deviation, tenth, 0.05 * usual[-1])
    return bool(distance > np.median(known) + 8 * spread and distance > known.max() + 4 * spread)


def test_the_bounds_are_those_of_a_slow_version() -> None:
    found = []
    for seed in range(120):
        chance = np.random.default_rng(seed)
        count = int(chance.integers(10, 200))
        losses = falling(count, ORDINARY["many rows a step"], seed)
        losses[chance.random(count) < 0.02] *= 1.5
        losses[-1] *= chance.uniform(1.3, 2.2)
        spikes = LossSpikes()
        spike = [spikes.take(loss) for loss in losses.tolist()][-1]
        assert (spike is not None) == slow_spike(losses.tolist())
        found.append(spike is not None)
    assert 30 < sum(found) < 90


def test_losses_that_hardly_differ_have_no_spike() -> None:
    spikes = LossSpikes()
    losses = [*[1.0] * 50, 1.39, *[1.0] * 20, 1.58, *[1.0] * 20, 1.79]
    assert [i for i, loss in enumerate(losses) if spikes.take(loss)] == [92]


def test_a_spike_is_told_of_once_in_a_while_and_names_its_rows() -> None:
    steps = [told(n, 1.0 + 0.01 * (n % 7) - n / 10_000) for n in range(1, 240)]
    for at, loss in ((60, 9.0), (62, 20.0), (110, 40.0), (111, 90.0), (150, 900.0), (210, 899.0)):
        steps[at - 1] = told(at, loss)
    watch = noticing(loss_spike="rollback", span=1000)
    found = [one for step in steps for one in watch.step(step)]
    assert names(found) == [("loss_spike", 60), ("loss_spike", 111)]
    assert found[0].rows == [3, 8]
    assert found[0].action == "rollback"
    assert found[0].severity == "warning"
    assert found[0].text.startswith("the loss of step 60 is 9.000 on rows 4 and 9, where 1.02")


def test_what_is_not_finite() -> None:
    watch = noticing(loss_not_finite="rollback")
    [found] = watch.step(told(7, math.nan, updated=False), "the loss of step 7 is NaN on row 1")
    assert (found.name, found.severity, found.action) == ("loss_not_finite", "error", "rollback")
    assert (found.text, found.rows) == ("the loss of step 7 is NaN on row 1", [3, 8])
    [found] = watch.step(told(8, 2.0, updated=False), "the gradient of step 8 …")
    assert found.name == "gradient_not_finite"
    [found] = watch.step(told(9, 2.0, updated=False))
    assert (found.name, found.severity, found.action) == ("gradient_not_finite", "warning", "say")
    assert "of rows 4 and 9, is not finite" in found.text
    scaled = noticing(scaled=True)  # there it is how the scale is found
    assert (
        watched(scaled, [told(n, 2.0 if n % 2 else math.nan, updated=False) for n in (1, 2)]) == []
    )


@pytest.mark.parametrize(
    ("labels", "scaled", "words"),
    [(0, False, "none of its tokens"), (5, True, "for fp16"), (5, False, "nothing was learned")],
)
def test_a_loss_of_exactly_0(labels: int, scaled: bool, words: str) -> None:
    watch = noticing(scaled=scaled)
    steps = [told(n, 1e-30 if n < 3 else 0.0, labels=labels) for n in range(1, 54)]
    found = [one for step in steps for one in watch.step(step)]
    assert names(found) == [("loss_zero", 3)]
    assert words in found[0].text
    assert names(watch.step(told(54, 0.0))) == [("loss_zero", 54)]


def test_a_hundred_steps_in_a_row_that_are_clipped() -> None:
    norms = [1.0] * 99 + [0.999] + [1.0] * 99 + [30.0] * 200
    steps = [told(n, 2.0 - n / 1000, grad_norm=norm) for n, norm in enumerate(norms, 1)]
    watch = noticing()
    found = [one for step in steps for one in watch.step(step)]
    assert names(found) == [("gradient_clipped", 200)]
    assert found[0].severity == "note"
    assert watched(noticing(clip=0.0), steps) == []
    assert watched(noticing(clip=1.5), steps) == [("gradient_clipped", 299)]


def test_a_loss_that_does_not_fall() -> None:
    def run(losses: Sequence[float]) -> list[tuple[str, int]]:
        return watched(noticing(), [told(n, loss) for n, loss in enumerate(losses, 1)])

    chance = np.random.default_rng(3)
    noise = 0.1 * chance.standard_normal(240)
    assert run((2.0 - np.arange(240) / 1000 + noise).tolist()) == []
    assert run((2.0 + np.arange(240) / 1000 + noise).tolist()) == [("no_learning", 60)]
    # It falls, and then rises slowly above where it began.
    fall_and_rise = np.concatenate([np.linspace(2, 1, 100), np.linspace(1, 4, 140)])
    assert run((fall_and_rise + noise).tolist()) == [("no_learning", 180)]
    assert run([2.0] * 59) == []
    assert span_of(16, 5) == 60
    assert span_of(1, 5) == 500
    assert span_of(16, 100) == 300


def test_overfitting() -> None:
    def run(held_out: Sequence[float], training: Sequence[float]) -> list[tuple[str, int]]:
        watch, found = noticing(span=1000), []
        for n, (held, train) in enumerate(zip(held_out, training, strict=True), 1):
            for at in range(10):
                watch.step(told(10 * (n - 1) + at + 1, train))
            found += names(watch.evaluation(10 * n, held))
        return found

    falling = [2.0, 1.8, 1.6, 1.4, 1.2, 1.0]
    assert run([2.0, 1.7, 1.6, 1.65, 1.7, 1.8], falling) == [("overfitting", 50)]
    assert run([2.0, 1.7, 1.6, 1.65, 1.63, 1.66], falling) == []  # up and down
    assert run([2.0, 1.7, 1.6, 1.605, 1.61, 1.614], falling) == []  # within a hundredth
    assert run([2.0, 1.7, 1.6, 1.65, 1.7, 1.8], [2.0, 1.8, 1.6, 1.6, 1.7, 1.8]) == []  # both rise
    assert run([2.0, 1.7, 1.6, math.nan, 1.65, 1.7], falling) == [("overfitting", 60)]
    assert run([1.6, 1.65, 1.7, 1.5, 1.55, 1.6], falling) == [
        ("overfitting", 30),
        ("overfitting", 60),
    ]


def test_what_is_kept_is_all_that_is_needed() -> None:
    """A watch that goes on from the JSON of another at any step notices what that one would."""
    chance = np.random.default_rng(8)
    losses = np.exp(0.1 * chance.standard_normal(400)).tolist()
    for at in (70, 130, 290):
        losses[at] = 9.0
    losses[200] = 0.0
    steps = [told(n, loss, grad_norm=2.0, updated=n != 91) for n, loss in enumerate(losses, 1)]
    held_out = {50: 1.5, 100: 1.3, 150: 1.35, 200: 1.4, 250: 1.5, 300: 1.2, 350: 1.25, 400: 1.3}

    def some(watch: Noticing, first: int, last: int) -> list[Noticed]:
        found = []
        for step in steps[first - 1 : last]:
            found += watch.step(step)
            if step.number in held_out:
                found += watch.evaluation(step.number, held_out[step.number])
        return found

    whole = some(noticing(), 1, 400)
    assert {one.name for one in whole} == {
        "loss_spike",
        "loss_zero",
        "gradient_clipped",
        "gradient_not_finite",
        "no_learning",
        "overfitting",
    }
    for at in (1, 12, 60, 90, 125, 225, 275, 320):
        first, second = noticing(), noticing()
        before = some(first, 1, at)
        second.load_state(json.loads(json.dumps(first.state(), allow_nan=False)))
        assert before + some(second, at + 1, 400) == whole


WRONG: list[tuple[str, Any]] = [
    ("noticing", []),
    ("noticing.spikes.losses", ["one"]),
    ("noticing.spikes.distances", 5),
    ("noticing.quiet", [1]),
    ("noticing.clipped", None),
    ("noticing.first", {"total": 1.0}),
    ("noticing.lowest", {"step": 1, "loss": "low"}),
    ("early_stopping.best", [3]),
    ("early_stopping.without", math.inf),
    ("skipped_in_a_row", "many"),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_state_that_was_made_up_is_refused(key: str, value: Any) -> None:
    def new() -> Reactions:
        recipe = Recipe.model_validate({"model": {"name": "m"}, "data": {"path": "d.jsonl"}})
        skipped = SkippedSteps(LossScaler(False, torch.device("cpu")), lambda step: "")
        unused: Any = None
        return Reactions(
            recipe, noticing(), skipped, RunRecord(), lag=0, sources=unused, stop=unused
        )

    state: Any = new().state()
    new().go_on_from([], json.loads(json.dumps(state)))
    *above, name = key.split(".")
    inside = state
    for part in above:
        inside = inside[part]
    inside[name] = value
    with pytest.raises(RunError, match="record of what was watched cannot be read"):
        new().go_on_from([], state)


def test_interventions_are_what_was_decided_by_then() -> None:
    made = Interventions()
    made.lower_rate(10, "loss_spike", 11, 0.5)
    made.leave_out(20, "loss_spike")
    made.lower_rate(25, "loss_spike", 34, 0.3)
    made.leave_out(30, "loss_not_finite")
    table = torch.tensor([1.0, 0.7, 0.1])
    half = table * 0.5
    for step, rates in ((10, table), (11, half), (33, half), (34, half * 0.3)):
        assert torch.equal(made.rates(table, step), rates)
    assert torch.equal(table, torch.tensor([1.0, 0.7, 0.1]))
    made.go_back_to(24)
    again = Interventions.from_plain(json.loads(json.dumps(made.plain())))
    assert again.made == made.made
    assert [n for n in range(40) if again.leaves_out(n)] == [20, 30]
    assert again.left_out == 2
    assert (again.factors(40), again.factors(10)) == ([0.5], [])
    for wrong in ({}, {"step": 1}, {"step": 1, "why": "", "first": 2, "factor": 7.0}):
        with pytest.raises((KeyError, ValueError)):
            Interventions.from_plain([wrong])


@pytest.mark.parametrize(
    ("patience", "min_delta", "losses", "stops", "best"),
    [
        (2, 0.0, [2.0, 1.9, 1.95, 1.9, 1.8], 4, 2),
        (2, 0.0, [2.0, 1.9, 1.95, 1.89, 1.9, 1.91], 6, 4),
        (3, 0.0, [2.0, 1.9, 1.95, 1.9, 1.8], None, None),
        (2, 0.05, [2.0, 1.96, 1.96, 1.5], 3, 1),
        (2, 0.05, [2.0, 1.96, 1.94, 1.9, 1.88], None, None),  # 0.06 below the best that counts
        (1, 0.0, [math.nan], 1, None),
        (2, 0.0, [math.inf, math.nan], 2, None),
        (None, 0.0, [1.0, *[2.0] * 50], None, None),
    ],
)
def test_early_stopping(
    patience: int | None, min_delta: float, losses: list[float], stops: int | None, best: int | None
) -> None:
    recipe = EarlyStoppingRecipe(patience=patience, min_delta=min_delta)
    early = EarlyStopping(recipe)
    for n, loss in enumerate(losses, 1):
        again = EarlyStopping(recipe)
        again.load_state(json.loads(json.dumps(early.state(), allow_nan=False)))
        early = again
        event = early.take(n, loss)
        assert event == early.stopped
        if event is not None:
            break
    assert (None if early.stopped is None else early.stopped.step) == stops
    if early.stopped is not None:
        assert (early.stopped.best_step, early.stopped.patience) == (best, patience)
