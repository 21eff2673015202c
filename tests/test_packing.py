"""Packs: nothing is lost or too long, they are well filled and mixed, and change no number."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

from halfbyte import Recipe, Run, train
from halfbyte.cli.app import app
from halfbyte.data.batch import TokenizedRow
from halfbyte.data.batching import Batches
from halfbyte.data.packing import PACKS_MORE, Packs, good_length
from halfbyte.events import read_events
from halfbyte.events.types import Choice, Event, Step, TrainingStarted, Warned
from halfbyte.plan.buckets import batch_sizes, choose_buckets
from halfbyte.run import rehearse

SOME = settings(deadline=None, max_examples=60)
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=80)


def slow_packs(lengths: Sequence[int], length: int, *, best: bool) -> list[list[int]]:
    """Lengths in packs, by looking at every pack: the fullest that has room, or the first."""
    packs: list[list[int]] = []
    for one in lengths:
        fitting = [pack for pack in packs if sum(pack) + one <= length]
        if not fitting:
            packs.append([one])
        elif best:
            max(fitting, key=sum).append(one)
        else:
            fitting[0].append(one)
    return packs


def packs_of(packs: Packs, epoch: int) -> list[list[int]]:
    """Positions of the rows of each pack."""
    found = packs.epoch(epoch)
    return [found.order[a:b].tolist() for a, b in pairwise(found.starts)]


def log_normal(count: int, median: float, sigma: float, longest: int, seed: int = 0) -> np.ndarray:
    """Lengths as instruction data has them, the longest rows cut."""
    z = np.random.default_rng(seed).normal(np.log(median), sigma, count)
    return np.clip(np.exp(z).round(), 2, longest).astype(np.int64)


def made_rows(lengths: Sequence[int], seed: int) -> list[TokenizedRow]:
    generator = np.random.default_rng(seed)
    return [
        TokenizedRow(
            np.full(n, number, dtype=np.int32), generator.random(n) < 0.5, row=1000 + number
        )
        for number, n in enumerate(lengths)
    ]


@SOME
@given(lengths=LENGTHS, spare=st.integers(0, 60), seed=st.integers(0, 99))
def test_each_epoch_has_every_row_once_in_packs_not_too_long(
    lengths: list[int], spare: int, seed: int
) -> None:
    length = max(lengths) + spare
    packs = Packs(np.array(lengths), length, seed)
    for epoch in range(3):
        found = packs_of(packs, epoch)
        assert len(found) == len(packs) == packs.count
        assert sorted(row for pack in found for row in pack) == list(range(len(lengths)))
        assert all(1 <= sum(lengths[row] for row in pack) <= length for pack in found)
        sizes = sorted(map(len, found))
        assert all(sum(sizes[-n:]) <= packs.most_rows(n) for n in (1, 2, len(found)))
    assert packs.fill == pytest.approx(sum(lengths) / (length * len(found)))


@SOME
@given(lengths=LENGTHS, spare=st.integers(0, 60), seed=st.integers(0, 99))
def test_packs_are_nearly_as_few_as_those_of_a_slow_best_fit_decreasing(
    lengths: list[int], spare: int, seed: int
) -> None:
    length = max(lengths) + spare
    slow = slow_packs(sorted(lengths, reverse=True), length, best=True)
    assert Packs(np.array(lengths), length, seed).count <= len(slow) * (1 + PACKS_MORE)


@pytest.mark.parametrize(
    ("median", "sigma", "length"), [(190, 0.6, 2048), (190, 0.8, 1024), (400, 0.8, 2048)]
)
def test_real_lengths_fill_packs_that_are_mixed(median: float, sigma: float, length: int) -> None:
    lengths = log_normal(1500, median, sigma, length)
    packs = Packs(lengths, length, seed=1)
    slow = {
        "best fit, longest first": slow_packs(sorted(lengths)[::-1], length, best=True),
        "first fit": slow_packs(lengths.tolist(), length, best=False),
    }
    fill = {name: lengths.sum() / (length * len(found)) for name, found in slow.items()}
    print(f"{len(lengths)} rows, {packs.count} packs of {length}: {packs.fill:.2%} filled;", fill)
    assert packs.fill >= 0.97
    assert packs.fill >= fill["first fit"]
    assert packs.count <= len(slow["best fit, longest first"]) * (1 + PACKS_MORE)

    # Rows of like length do not lie together, as they do where the longest come first.
    ours = [[int(lengths[row]) for row in pack] for pack in packs_of(packs, 0)]
    by_length = slow["best fit, longest first"]
    beyond_chance = [between(one) - by_chance(one) for one in (ours, by_length)]
    assert beyond_chance[0] < 0.6 * beyond_chance[1]
    # And two that lie together in one epoch seldom do in the next.
    first, second = (pairs(packs_of(packs, epoch)) for epoch in (0, 1))
    assert len(first & second) / len(first) < 5 / packs.count


def between(packs: list[list[int]]) -> float:
    """The share of the variance of the lengths that lies between packs and not within them."""
    every = np.concatenate([np.array(pack) for pack in packs])
    means = np.repeat([np.mean(pack) for pack in packs], [len(pack) for pack in packs])
    return float(means.var() / every.var())


def by_chance(packs: list[list[int]]) -> float:
    """The same where packs of so many rows each get any rows."""
    return len(packs) / sum(map(len, packs))


def pairs(packs: list[list[int]]) -> set[tuple[int, int]]:
    return {pair for pack in packs for pair in combinations(sorted(pack), 2)}


def test_an_epoch_follows_from_the_seed_and_its_number_alone() -> None:
    lengths = log_normal(300, 20, 0.7, 128)
    packs = Packs(lengths, 128, seed=3)
    in_order = [packs_of(packs, epoch) for epoch in range(8)]  # more than are kept
    for epoch in (5, 0, 7, 2, 5):
        assert packs_of(Packs(lengths, 128, seed=3), epoch) == in_order[epoch]
        assert packs_of(packs, epoch) == in_order[epoch]
    assert all(in_order[a] != in_order[b] for a, b in combinations(range(8), 2))
    assert packs_of(Packs(lengths, 128, seed=4), 0) != in_order[0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a row of 9 tokens does not fit into 8"):
        Packs(np.array([3, 9]), 8, 0)
    with pytest.raises(ValueError, match="no rows to pack"):
        Packs(np.array([], dtype=np.int64), 8, 0)
    with pytest.raises(ValueError, match="2 rows were packed, and there are 3"):
        Batches(made_rows([1, 2, 3], 0), 1, 1, 0, packs=Packs(np.array([1, 2]), 8, 0))


@SOME
@given(
    lengths=LENGTHS,
    spare=st.integers(0, 60),
    size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_batches_of_packs(
    lengths: list[int], spare: int, size: int, accumulation: int, seed: int
) -> None:
    """Each row once an epoch with all of its labels, none across a border, resumable anywhere."""
    rows, length = made_rows(lengths, seed), max(lengths) + spare
    packs = Packs(np.array(lengths), length, seed)

    def fresh() -> Batches:
        again = Packs(np.array(lengths), length, seed)
        return Batches(rows, size, accumulation, seed, packs=again)

    batches = fresh()
    per_epoch = batches.steps_per_epoch
    assert per_epoch == -(-packs.count // (size * accumulation))
    steps = [batches.step(number) for number in range(1, 2 * per_epoch + 1)]
    for epoch in (steps[:per_epoch], steps[per_epoch:]):
        found = [batch for step in epoch for batch in step]
        assert sorted(row for batch in found for row in batch.rows) == [row.row for row in rows]
        assert len(found) == -(-packs.count // size)
        assert sum(batch.num_labels for batch in found) == sum(row.num_labels for row in rows)
    for batch in (batch for step in steps for batch in step):
        assert batch.num_tokens <= size * length
        assert len(batch.cu_seqlens) == batches.capacity + 1
        borders = batch.cu_seqlens.tolist()
        for number, (start, stop) in zip(batch.rows, pairwise(borders), strict=False):
            row = rows[number - 1000]
            assert batch.input_ids[start:stop].tolist() == row.input_ids.tolist()
            assert batch.position_ids[start:stop].tolist() == list(range(len(row)))
            assert batch.labels[stop - 1] == -100
            learned = (batch.labels[start : stop - 1] != -100).tolist()
            assert learned == row.loss_mask[1:].tolist()
    at = np.random.default_rng(seed).integers(1, len(steps) + 1)
    for one, other in zip(fresh().step(int(at)), steps[at - 1], strict=True):
        assert one.rows == other.rows
        assert torch.equal(one.input_ids, other.input_ids)


@SOME
@given(
    lengths=LENGTHS,
    size=st.integers(1, 4),
    steps=st.integers(1, 40),
    limit=st.sampled_from([2, 2000]),
    seed=st.integers(0, 99),
)
def test_every_batch_of_packs_fits_a_bucket(
    lengths: list[int], size: int, steps: int, limit: int, seed: int
) -> None:
    rows = made_rows(lengths, seed)
    packs = Packs(np.array(lengths), 50, seed)
    sizes = batch_sizes(Batches(rows, size, 1, seed, packs=packs), steps, limit)
    assert sizes.largest[0] <= size * 50
    buckets = choose_buckets(sizes, seconds_per_token=1e-3, capture_seconds=0.1)
    padded = Batches(rows, size, 1, seed, buckets, packs)
    for step in range(1, steps + 1):
        [batch] = padded.step(step)
        extra = -(-len(batch.input_ids) // batch.max_seqlen)
        assert len(batch.cu_seqlens) == padded.capacity + 1 + extra


def recipe(model: Path, rows: Path, **training: object) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": str(model)},
            "data": {"path": str(rows), "held_out": 4, "max_length": 256, "packing": True},
            "lora": {"r": 4, "lora_dropout": 0.1},
            "training": {"batch_size": 1, "gradient_accumulation": 2, "epochs": 3, **training},
            "evaluation": {"every_steps": 2, "prompts": 0, "base_loss": False},
        }
    )


def events(run: Run) -> list[Event]:
    return [record.event for record in read_events(run.folder)]


def test_an_interrupted_run_of_packs_goes_on_as_if_it_had_not_been(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    whole = train(recipe(tiny_model, tiny_rows), out=tmp_path / "whole", runs=tmp_path)
    [packing] = [e for e in events(whole) if isinstance(e, Choice) and e.key == "data.packing"]
    [started] = [e for e in events(whole) if isinstance(e, TrainingStarted)]
    steps = [e for e in events(whole) if isinstance(e, Step)]
    assert started.packs is not None
    assert len(steps) == started.steps == 3 * -(-started.packs // 2)
    share = 100 * sum(e.tokens for e in steps) / (3 * 256 * started.packs)
    assert (packing.asked, packing.value) == (True, True)
    told = [e.text for e in events(whole) if isinstance(e, Warned)]
    assert not any("filled" in text for text in told)
    assert packing.reason == (
        f"20 rows in {started.packs} packs of 256 tokens, {share:.1f} % filled"
    )
    report = (whole.folder / "report.md").read_text(encoding="utf-8")
    assert "| packs in a forward pass | 1 |" in report

    def interrupt(event: Event) -> None:
        if isinstance(event, Step) and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = train(
        recipe(tiny_model, tiny_rows), out=tmp_path / "run", runs=tmp_path, listeners=[interrupt]
    )
    assert (stopped.interrupted, stopped.step) == (True, 3)
    finished = train(resume=tmp_path / "run", runs=tmp_path)
    assert finished.losses() == whole.losses()
    one, other = (load_file(r.adapter / "adapter_model.safetensors") for r in (finished, whole))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_packs_that_rows_fill_badly_are_pointed_out(tiny_model: Path, tiny_rows: Path) -> None:
    asked = recipe(tiny_model, tiny_rows)
    asked.data.max_length = 110
    told = rehearse(asked)
    [text] = [e.text for e in told.events if isinstance(e, Warned) and "filled" in e.text]
    better = good_length(told.audit.tokens, told.audit.rows_used)
    assert f"--set data.max_length={better} " in text
    mean = told.audit.tokens / told.audit.rows_used
    assert 8 * mean <= better < 8 * mean + 64


def test_the_command_line_packs(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    asked = recipe(tiny_model, tiny_rows).model_dump(exclude_unset=True)
    path.write_text(json.dumps({**asked, "data": {"path": str(tiny_rows)}}), encoding="utf-8")
    words: list[Any] = ["train", path, "--set", "data.packing=true", "--max-steps", 3]
    words += ["--set", "data.max_length=200", "--set", "training.batch_size=auto"]
    words += ["--set", "training.gradient_accumulation=auto"]
    told = CliRunner().invoke(app, [*map(str, words), "--dry-run"])
    assert told.exit_code == 0, told.output
    result = CliRunner().invoke(app, [*map(str, words), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    found = [record.event for record in read_events(tmp_path / "run")]
    [started] = [e for e in found if isinstance(e, TrainingStarted)]
    assert started.packs is not None
    a_step = started.batch_size * started.gradient_accumulation
    # About sixteen rows, since that is what a step has where nothing else is said.
    assert a_step == round(16 * started.packs / started.rows)
    assert started.steps_per_epoch == -(-started.packs // a_step)
    assert f"in {started.packs} packs, {a_step} a step" in result.output
    assert f"3 steps of {a_step} packs" in told.output
    assert sum(isinstance(e, Step) for e in found) == 3
