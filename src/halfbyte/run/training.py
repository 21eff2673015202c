"""A training run from a recipe to its folder: the order in which things happen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

import halfbyte
from halfbyte.errors import DivergenceError, HalfbyteError, RunError
from halfbyte.events import Emit
from halfbyte.events.types import (
    Finished,
    Interrupted,
    RunStarted,
    StopAsked,
    TrainingStarted,
    Warned,
)
from halfbyte.loop.steps import run_steps
from halfbyte.recipe import Recipe
from halfbyte.recipe.write import dump_recipe
from halfbyte.run.adapter_start import save_start
from halfbyte.run.ahead import import_ahead, key_ahead
from halfbyte.run.allocator import spare_memory
from halfbyte.run.assembly import DECIDED_ANEW, Assembly, assemble, with_max_steps
from halfbyte.run.determinism import deterministic
from halfbyte.run.ending import end_run
from halfbyte.run.folder import (
    Claimed,
    check_space,
    claim_folder,
    clear_folder,
    is_disk_full,
    point_latest,
)
from halfbyte.run.interrupt import StopRequest
from halfbyte.run.kernel_trial import kernel_trial
from halfbyte.run.outcome import Run
from halfbyte.run.record import RunRecord
from halfbyte.run.resume import Resumed, open_resumed
from halfbyte.run.setup import Trainer, capture, load_model, make_trainer, strategy
from halfbyte.run.strategy import FILE_NAME as STRATEGY_FILE
from halfbyte.run.techniques import techniques
from halfbyte.run.watch import Watch

# How many steps the losses of a GPU are read late, so that it never waits for the host.
LAG = 8


def train(
    recipe: Recipe | None = None,
    *,
    out: Path | str | None = None,
    recipe_name: str | None = None,
    asked: str | None = None,
    max_steps: int | None = None,
    overwrite: bool = False,
    resume: Path | str | None = None,
    runs: Path | str = Path("runs"),
    listeners: Sequence[Emit] = (),
    command: list[str] | None = None,
    recipe_folder: Path | None = None,
) -> Run:
    """Fine-tune as ``recipe`` says; returns the run, whose folder holds all that came out.

    ``out`` is the run folder (by default the next free ``runs/<recipe_name>-<date>-<n>``);
    ``recipe_name`` and ``recipe_folder``, where relative paths are looked for after the working
    directory, are those of the file that a recipe was loaded from;
    ``asked`` the recipe's own text, kept beside the effective one; ``max_steps`` ends the run
    earlier than the recipe does; ``resume`` goes on with an interrupted run's folder, and then
    the recipe is the one in it. ``listeners`` are called with every event.

    Raises a HalfbyteError, and leaves nothing behind, for whatever is wrong before step 1; raises
    DivergenceError, with the folder and its report as they are by then, where the loss or the
    adapter is no longer finite.
    """
    began = time.time()
    record = RunRecord(listeners)
    runs = Path(runs)
    resumed: Resumed | None = None
    claimed: Claimed | None = None
    if resume is not None:
        resumed = open_resumed(Path(resume))
        recipe, folder = resumed.recipe, resumed.folder
    elif recipe is None:
        raise RunError("there is no recipe to train; give one, or a run folder to resume.")
    else:
        if recipe.file is not None:
            recipe_name = recipe_name or recipe.file.stem
            recipe_folder = recipe_folder or recipe.file.parent
        recipe = with_max_steps(recipe, max_steps)
        claimed = claim_folder(
            None if out is None else Path(out), runs, recipe_name or "run", overwrite=overwrite
        )
        folder = claimed.folder
    if recipe.memory_limit_gb is not None:
        spare_memory()
    try:
        record(
            RunStarted(
                version=halfbyte.__version__,
                command=command or ["halfbyte.train"],
                folder=str(folder),
                resumed_from=resumed.state.step if resumed else None,
            )
        )
        if resumed is not None and resumed.strategy is None:
            record(Warned(f"{folder / STRATEGY_FILE} cannot be read: {DECIDED_ANEW}"))
        if torch.cuda.is_available():
            key_ahead()
        assembly = assemble(
            recipe,
            record,
            recipe_folder=recipe_folder,
            tell=resumed is None,
            earlier=resumed.strategy if resumed else None,
        )
        with _same_bits(assembly), _own_stream(assembly):
            trainer = _prepare(assembly, record, resumed)
            check_space(folder, _bytes_written(trainer, assembly.recipe.checkpoints.keep_last))
            if resumed is None:
                clear_folder(folder)
                (folder / "recipe.yaml").write_text(dump_recipe(assembly.recipe), encoding="utf-8")
                text = asked if asked is not None else dump_recipe(recipe)
                (folder / "recipe.asked.yaml").write_text(text, encoding="utf-8")
            if assembly.earlier is None:
                strategy(assembly, trainer).write(folder)
            if resumed is None:
                save_start(folder, assembly, trainer.model)
            record.open(folder)
            point_latest(folder, runs)
            return _run(assembly, trainer, record, folder, began, resumed)
    except Exception as error:
        if isinstance(error, HalfbyteError) or not is_disk_full(error):
            raise
        raise RunError(
            f"the disk of {folder} is full; free some space"
            + (f" and go on with halfbyte train --resume {folder}." if record.opened else ".")
        ) from error
    finally:
        record.close()
        if not record.opened and claimed is not None:
            claimed.release()


def _same_bits(assembly: Assembly) -> AbstractContextManager[Any]:
    on_gpu = assembly.device.kind == "cuda"
    return deterministic(on_gpu and assembly.recipe.training.deterministic)


def _own_stream(assembly: Assembly) -> AbstractContextManager[Any]:
    """On a GPU a stream for all that the run does: the default one cannot be captured, and each
    stream that multiplies has work space of its own."""
    if assembly.device.kind == "cpu":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream())


def _prepare(assembly: Assembly, record: RunRecord, resumed: Resumed | None) -> Trainer:
    """Everything in memory that step 1 (or the step after a checkpoint's) needs."""
    with kernel_trial(assembly, record) as trial, record.phase("quantize"):
        model, loaded = load_model(
            assembly.recipe,
            assembly.source,
            assembly.device,
            copied_layers=assembly.resolved.copied_layers,
            embedding_on_host=assembly.resolved.embedding_on_host,
            record=record,
            earlier=assembly.earlier,
            trial=trial,
            begun=None if resumed is None else resumed.folder,
        )
    record(loaded)
    trainer = make_trainer(assembly, model)
    if resumed is not None:
        resumed.check(assembly)
        trainer.load_state(resumed.tensors)
        with record.phase("warm-up"):
            return capture(assembly, trainer, record)
    with record.phase("warm-up"):
        events = techniques(
            assembly.recipe,
            model,
            [*assembly.data.choices, *assembly.resolved.choices],
            assembly.data.train,
            assembly.batches.step(1)[0],
            sum(t.numel() * t.element_size() for t in trainer.optimizer.state_tensors().values()),
        )
        trainer = capture(assembly, trainer, record)
    for event in events:
        record(event)
    return trainer


def _run(
    assembly: Assembly,
    trainer: Trainer,
    record: RunRecord,
    folder: Path,
    began: float,
    resumed: Resumed | None,
) -> Run:
    """The steps, and what comes after them."""
    recipe, resolved = assembly.recipe, assembly.resolved
    record(
        TrainingStarted(
            rows=len(assembly.data.train),
            batch_size=int(recipe.training.batch_size),
            gradient_accumulation=int(recipe.training.gradient_accumulation),
            steps=resolved.steps,
            steps_per_epoch=resolved.steps_per_epoch,
            epochs=resolved.steps / resolved.steps_per_epoch,
            device=assembly.device.name,
            precision=str(recipe.precision),
            packs=None if assembly.packs is None else assembly.packs.count,
        )
    )
    watch = Watch(assembly, trainer, record, folder)
    if assembly.device.kind == "cuda":
        import_ahead()
    first = 1 if resumed is None else resumed.state.step + 1
    try:
        with StopRequest(lambda name: record.tell(StopAsked(name))) as stop:
            if resumed is None:
                watch.evaluate_start()
            else:
                watch.go_on_from(resumed.state, resumed.best)
            last = run_steps(
                trainer.take_step,
                assembly.batches.step,
                first=first,
                last=resolved.steps,
                after=[watch.note_step, watch.evaluate, watch.checkpoint],
                stop=lambda: stop.requested,
                lag=0 if assembly.device.kind == "cpu" else LAG,
                needs_state=watch.needs_state,
            )
        if last < resolved.steps:
            watch.save(last)
    except DivergenceError:
        watch.note_energy()
        Run.make(folder, interrupted=True)  # writes the report of what there is
        raise
    watch.note_energy()
    if last < resolved.steps:
        record(Interrupted(last, stop.name))
        return Run.make(folder, interrupted=True)
    end_run(assembly, trainer, watch, record, folder)
    record(Finished(last, time.time() - began))
    return Run.make(folder, interrupted=False)


def _bytes_written(trainer: Trainer, keep_last: int) -> int:
    """Upper bound of what the run writes: checkpoints (one more while it is written), adapter."""
    state = sum(t.numel() * t.element_size() for t in trainer.state().values())
    return state * (keep_last + 3) + 50_000_000
