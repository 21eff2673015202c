"""How a run makes its steps is decided once, written down, and done again when it goes on."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from halfbyte import Recipe, Run, train
from halfbyte.checkpoint.manifest import write_manifest
from halfbyte.data.batch import Bucket
from halfbyte.errors import RunError
from halfbyte.events import read_events
from halfbyte.events.types import Event, ModelLoaded, Step, Warned
from halfbyte.kernels import lora_group_plain
from halfbyte.kernels.choice import ALL, ELEMENTWISE, PLAIN
from halfbyte.plan.device import find_device
from halfbyte.run.assembly import assemble
from halfbyte.run.record import RunRecord
from halfbyte.run.resume import open_resumed
from halfbyte.run.strategy import (
    FILE_NAME,
    Strategy,
    kernel_names,
    kernels_named,
    read_strategy,
    versions_here,
)

CPU = find_device("cpu")
STRATEGY = Strategy(
    device=CPU.name,
    versions=versions_here(),
    recomputed_layers=1,
    copied_layers=0,
    kernels=kernel_names(replace(ALL, attention=PLAIN.attention)),
    products={"64x128x256 bfloat16 forth": "cublaslt"},
    buckets=[Bucket(512, 64, 128), Bucket(1024, 128, 256)],
    captured=True,
    deterministic=True,
)


def recipe(model: Path, rows: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "device": "cpu",
            "model": {"name": str(model)},
            "data": {"path": str(rows), "held_out": 0},
            "lora": {"r": 4},
            "training": {"batch_size": 2, "gradient_accumulation": 1, "max_steps": 4},
            "evaluation": {"prompts": 0, "base_loss": False},
        }
    )


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    for strategy in (STRATEGY, replace(STRATEGY, buckets=None, captured=False)):
        strategy.write(tmp_path)
        assert read_strategy(tmp_path) == strategy
    assert STRATEGY.why_not_here(CPU) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"buckets": [{"size": 1}]}', "\x00"])
def test_a_file_that_says_nothing_counts_as_none(text: str, tmp_path: Path) -> None:
    assert read_strategy(tmp_path) is None
    (tmp_path / FILE_NAME).write_text(text)
    assert read_strategy(tmp_path) is None


def test_kernels_are_found_by_their_names() -> None:
    mixed = replace(ELEMENTWISE, attention=ALL.attention, head_loss=PLAIN.head_loss)
    for kernels in (ALL, ELEMENTWISE, PLAIN, mixed):
        found = kernels_named(kernel_names(kernels))
        assert found is not None
        assert kernel_names(found) == kernel_names(kernels)
    assert kernels_named(kernel_names(mixed)) == mixed
    names = [kernel_names(kernels)["lora_down"] for kernels in (ALL, ELEMENTWISE, PLAIN)]
    assert len(set(names)) == 3
    other = replace(PLAIN, lora_down=partial(lora_group_plain.lora_down, apply=print))
    assert kernels_named(kernel_names(other)) is None
    assert kernels_named({}) is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"device": "Tesla T4"}, "this run began on Tesla T4 and goes on on"),
        ({"versions": versions_here() | {"torch": "1.0"}}, "began with torch 1.0 and goes on with"),
        (
            {"versions": versions_here() | {"gone": "2"}},
            "began with gone 2 and goes on with absent",
        ),
        ({"kernels": {}}, "with kernels that are not there any more"),
    ],
)
def test_another_machine_or_another_version_decides_anew(
    changed: dict[str, object], reason: str, tiny_model: Path, tiny_rows: Path
) -> None:
    told: list[Event] = []
    earlier = replace(STRATEGY, **changed)  # type: ignore[arg-type]
    asked = recipe(tiny_model, tiny_rows)
    assembly = assemble(asked, RunRecord([told.append]), tell=False, earlier=earlier)
    (warning,) = [event for event in told if isinstance(event, Warned)]
    assert reason in warning.text
    assert "is decided anew" in warning.text
    assert assembly.earlier is None
    assert assembly.buckets is None
    assert assembly.resolved.copied_layers == 2


def test_a_run_that_goes_on_has_the_same_buckets(tiny_model: Path, tiny_rows: Path) -> None:
    asked, told = recipe(tiny_model, tiny_rows), list[Event]()
    assembly = assemble(asked, RunRecord([told.append]), tell=False, earlier=STRATEGY)
    assert not [event for event in told if isinstance(event, Warned)]
    assert assembly.buckets == STRATEGY.buckets
    for number in range(1, 5):
        (batch,) = assembly.batches.step(number)
        assert Bucket(len(batch.input_ids), len(batch.label_ids), batch.max_seqlen) in (
            STRATEGY.buckets or []
        )
    assert (assembly.resolved.recomputed_layers, assembly.resolved.copied_layers) == (1, 0)


def interrupted(model: Path, rows: Path, folder: Path) -> Run:
    def interrupt(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    return train(recipe(model, rows), out=folder, runs=folder.parent, listeners=[interrupt])


def test_a_resumed_run_does_as_is_written(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    run = interrupted(tiny_model, tiny_rows, tmp_path / "run")
    written = read_strategy(run.folder)
    assert written is not None
    assert (written.copied_layers, written.recomputed_layers) == (2, 0)
    assert (written.buckets, written.captured) == (None, False)
    assert kernels_named(written.kernels) == PLAIN
    replace(written, copied_layers=0).write(run.folder)
    before = (run.folder / FILE_NAME).read_text()
    finished = train(resume=run.folder, runs=tmp_path)
    assert finished.finished
    assert (run.folder / FILE_NAME).read_text() == before
    loaded = [r.event for r in read_events(run.folder) if isinstance(r.event, ModelLoaded)]
    assert loaded[0].bytes_copy > 0
    assert loaded[1].bytes_copy == 0


def test_a_run_resumed_elsewhere_writes_down_what_it_does_from_then_on(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    run = interrupted(tiny_model, tiny_rows, tmp_path / "run")
    written = read_strategy(run.folder)
    assert written is not None
    elsewhere = replace(written, device="Tesla T4", copied_layers=0)
    elsewhere.write(run.folder)
    with pytest.raises(RunError, match=r"began on Tesla T4 .* bit for bit .*--allow machine"):
        train(resume=run.folder, runs=tmp_path)
    assert read_strategy(run.folder) == elsewhere
    assert train(resume=run.folder, runs=tmp_path, allow=["machine"]).finished
    assert read_strategy(run.folder) == written
    warnings = [r.event.text for r in read_events(run.folder) if isinstance(r.event, Warned)]
    assert [text for text in warnings if text.startswith("this run began on Tesla T4")]


def test_a_run_whose_file_is_gone_says_so(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    run = interrupted(tiny_model, tiny_rows, tmp_path / "run")
    written = (run.folder / FILE_NAME).read_text()
    (run.folder / FILE_NAME).unlink()
    checkpoint = run.folder / "checkpoints" / "step-2"
    assert open_resumed(run.folder).strategy == read_strategy(checkpoint)
    (checkpoint / FILE_NAME).write_text("{}")
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)
    with pytest.raises(RunError, match=r"strategy.json, how .* cannot be read, .*--allow machine"):
        train(resume=run.folder, runs=tmp_path)
    told: list[Event] = []
    train(resume=run.folder, runs=tmp_path, allow=["machine"], listeners=[told.append])
    warned = [event.text for event in told if isinstance(event, Warned)]
    assert any("strategy.json, how steps are made, cannot be read" in text for text in warned)
    assert (run.folder / FILE_NAME).read_text() == written
