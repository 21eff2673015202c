"""A training run from a recipe to its folder: the order in which things happen."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import DivergenceError, RunError
from halfbyte.events import Emit
from halfbyte.events.types import (
    Finished,
    Interrupted,
    StopAsked,
    TrainingStarted,
)
from halfbyte.loop.steps import run_steps
from halfbyte.recipe import Recipe
from halfbyte.run.ahead import import_ahead, key_ahead
from halfbyte.run.allocator import spare_memory
from halfbyte.run.assembly import Assembly, assemble, with_max_steps
from halfbyte.run.changes import require_known
from halfbyte.run.determinism import deterministic
from halfbyte.run.ending import end_run
from halfbyte.run.folder import (
    check_space,
    point_latest,
)
from halfbyte.run.interrupt import StopRequest
from halfbyte.run.kernel_trial import kernel_trial
from halfbyte.run.mirroring import with_mirror
from halfbyte.run.opening import (
    Wanted,
    fill_folder,
    open_run,
    place_of,
    take_folder,
    told_of_the_disk,
)
from halfbyte.run.outcome import Run
from halfbyte.run.place import AUTO
from halfbyte.run.reacting import GoBackError
from halfbyte.run.record import RunRecord
from halfbyte.run.resume import Point, Resumed
from halfbyte.run.setup import Trainer, capture, load_model, make_trainer
from halfbyte.run.stepper import Stepper
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
    allow: Collection[str] = (),
    mirror: str | None = None,
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
    earlier than the recipe does. ``listeners`` are called with every event.

    ``resume`` goes on with an interrupted run's folder, with the recipe in it unless one is given;
    ``"auto"`` goes on with the run in ``out``, or the newest of that name, and begins one where
    there is none. ``allow`` names what may be another than when the run began: ``"machine"``, or
    settings such as ``"training.epochs"``. ``mirror`` is ``checkpoints.mirror`` in place of the
    recipe's: finished checkpoints are copied there, and a run that goes on and whose folder is lost
    is brought back from there.

    Raises a HalfbyteError, and leaves nothing behind, for whatever is wrong before step 1; raises
    DivergenceError, with the folder and its report as they are by then, where the loss or the
    adapter is no longer finite.
    """
    began = time.time()
    require_known(allow)
    record = RunRecord(listeners)
    if recipe is None and (resume is None or str(resume) == AUTO):
        raise RunError("there is no recipe to train; give one, or a run folder to resume.")
    if recipe is not None:
        if recipe.file is not None:
            recipe_name = recipe_name or recipe.file.stem
            recipe_folder = recipe_folder or recipe.file.parent
        recipe = with_mirror(with_max_steps(recipe, max_steps), mirror)
    wanted = Wanted(
        out=None if out is None else Path(out),
        runs=Path(runs),
        recipe_name=recipe_name or "run",
        overwrite=overwrite,
        resume=resume,
        allow=allow,
        mirror=mirror,
        command=command or ["halfbyte.train"],
    )
    with ExitStack() as held:
        stop = held.enter_context(StopRequest(lambda name: record.tell(StopAsked(name))))
        place = place_of(recipe, wanted, record)
        if place.finished:
            return Run.make(place.folder, interrupted=False)
        lock, copies = take_folder(held, place, record)
        with told_of_the_disk(place.folder, record, lock):
            opened = open_run(held, place, recipe, wanted, record)
            if opened.recipe.memory_limit_gb is not None:
                spare_memory()
            copies.begin(opened.recipe.checkpoints.mirror, opened.run_id, new=not opened.begun)
            if torch.cuda.is_available():
                key_ahead()
            assembly = assemble(
                opened.recipe,
                record,
                recipe_folder=recipe_folder,
                tell=not opened.begun,
                earlier=opened.resumed.strategy if opened.resumed else None,
                only_here=opened.only_here(allow),
                run_id=opened.run_id,
            )
            if opened.resumed is not None:
                opened.resumed.check_rows(assembly)
            with _same_bits(assembly), _own_stream(assembly):
                trainer = _prepare(assembly, record, opened.resumed)
                keep_last = assembly.recipe.checkpoints.keep_last
                check_space(place.folder, _bytes_written(trainer, keep_last))
                fill_folder(place.folder, assembly, trainer, opened, asked)
                record.open(place.folder)
                opened.trackers.begin(assembly.recipe, place.folder)
                point_latest(place.folder, wanted.runs)
                watch = Watch(
                    assembly,
                    trainer,
                    record,
                    place.folder,
                    copies,
                    lock,
                    lag=lag_of(assembly),
                )
                # Before the lock is let go, after which another process may write.
                held.callback(watch.writer.close)
                copies.follow(watch.writer)
                return _run(
                    assembly,
                    trainer,
                    watch,
                    record,
                    None if opened.resumed is None else opened.resumed.point,
                    stop,
                    began,
                )


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
    assembly.weights  # noqa: B018 - begins to hash the files that are read now
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
            begun=None if resumed is None else resumed.begun,
        )
    record(loaded)
    trainer = make_trainer(assembly, model)
    if resumed is not None and resumed.point is not None:
        resumed.check_model(assembly)
        trainer.load_state(resumed.point.tensors)
        resumed.point.tensors.clear()  # not needed any more, and as large as the state itself
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
    watch: Watch,
    record: RunRecord,
    point: Point | None,
    stop: StopRequest,
    began: float,
) -> Run:
    """The steps after ``point``, and what comes after them."""
    recipe, resolved, folder = assembly.recipe, assembly.resolved, watch.folder
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
            watched=True,
        )
    )
    if assembly.device.kind == "cuda":
        import_ahead()
    try:
        stop.stepping = True
        if point is None:
            watch.keep_start()
            watch.evaluate_start()
        else:
            watch.go_on_from(point.state, point.best)
        done = 0 if point is None else point.state.step
        last = _steps(assembly, trainer, watch, record, stop, done)
        watch.lock.check()
        if last < resolved.steps:
            watch.save(last)
        watch.finish_saving()
        stop.stepping = False
    except DivergenceError:
        watch.note_energy()
        Run.make(folder, interrupted=True)  # writes the report of what there is
        raise
    watch.note_energy()
    if last < resolved.steps and not watch.ended_early:
        record(Interrupted(last, stop.name))
        return Run.make(folder, interrupted=True, signal=stop.name)
    end_run(assembly, trainer, watch, record, folder, last)
    record(Finished(last, time.time() - began))
    watch.copies.ended = True
    return Run.make(folder, interrupted=False)


def _steps(
    assembly: Assembly,
    trainer: Trainer,
    watch: Watch,
    record: RunRecord,
    stop: StopRequest,
    done: int,
) -> int:
    """The steps after ``done``, some of them again where the run goes back; returns the last."""
    stepper = Stepper(trainer, assembly.batches, lambda: watch.interventions, record.work)
    while not watch.ended_early:
        try:
            return run_steps(
                stepper.take,
                stepper.batches,
                first=done + 1,
                last=assembly.resolved.steps,
                after=[watch.note_step, watch.evaluate, watch.checkpoint],
                stop=lambda: stop.requested or watch.lock.lost is not None or watch.ended_early,
                lag=lag_of(assembly),
                needs_state=watch.needs_state,
            )
        except GoBackError as back:
            done = watch.go_back(back)
    return done


def lag_of(assembly: Assembly) -> int:
    """How many steps late a step is read at most."""
    return 0 if assembly.device.kind == "cpu" else LAG


def _bytes_written(trainer: Trainer, keep_last: int) -> int:
    """Upper bound of what the run writes: checkpoints (the best one too, one more while it is
    written, each with the best adapter), and the adapter."""
    state = sum(t.numel() * t.element_size() for t in trainer.state().values())
    return 2 * state * (keep_last + 3) + 50_000_000
