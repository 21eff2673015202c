"""What happens between the steps: events, held-out loss, checkpoints."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import psutil
import torch
from torch import Tensor

from halfbyte.checkpoint.snapshot import HostCopies, Snapshot
from halfbyte.checkpoint.state import CheckpointState
from halfbyte.checkpoint.writer import CheckpointWriter
from halfbyte.errors import DivergenceError, RunError
from halfbyte.evaluate.held_out import held_out_loss
from halfbyte.events.log import FILE_NAME as EVENTS_FILE
from halfbyte.events.types import (
    Checkpointed,
    Diverged,
    Evaluated,
    Noticed,
    RolledBack,
    Step,
    Warned,
)
from halfbyte.loop.steps import FinishedStep
from halfbyte.run.assembly import Assembly
from halfbyte.run.divergence import SkippedSteps, named_rows, sentence, stop_sentence
from halfbyte.run.energy import EnergyMeter
from halfbyte.run.fingerprint import package_versions
from halfbyte.run.folder import GOES_ON_WITH
from halfbyte.run.lock import RunLock
from halfbyte.run.mirroring import Mirroring
from halfbyte.run.reacting import GoBackError, Reactions
from halfbyte.run.record import RunRecord
from halfbyte.run.resume import Point, newest_point
from halfbyte.run.setup import Trainer
from halfbyte.watching.interventions import Interventions
from halfbyte.watching.noticing import Noticing, span_of


class Watch:
    """The callables that the loop calls after each step, and what they remember.

    ``best_step``, ``best_loss`` and ``best_adapter`` belong to the lowest held-out loss so far.
    """

    def __init__(
        self,
        assembly: Assembly,
        trainer: Trainer,
        record: RunRecord,
        folder: Path,
        copies: Mirroring,
        lock: RunLock,
        lag: int,
    ) -> None:
        """``lag`` is how many steps late a step is read at most."""
        self.assembly = assembly
        self.trainer = trainer
        self.record = record
        self.folder = folder
        self.copies = copies
        self.lock = lock
        self.writer = CheckpointWriter(
            folder / "checkpoints", assembly.recipe.checkpoints.keep_last
        )
        self._copies = HostCopies()
        self._copies.copy(trainer.state())  # takes the memory, for which a step would wait
        self.best_step: int | None = None
        self.best_loss: float | None = None
        self.best_adapter: dict[str, Tensor] | None = None
        self._last_loss: tuple[int, float] | None = None  # step, held-out loss
        self._submitted = 0  # step of the last checkpoint that was begun
        self._saved = 0  # and of the last that is whole
        self._stood_still = 0.0  # seconds for the checkpoint that is being written
        self.skipped = SkippedSteps(trainer.scaler, self._name_rows)
        self.reactions = self._reactions(lag)
        # Kept on the host: a rate read from the device would wait for all steps queued there.
        self._schedule = trainer.step.learning_rates.cpu().clone()
        self._rates: tuple[list[float], list[float]] | None = None  # factors, rates with them
        self._start: Point | None = None
        self._process = psutil.Process()
        self._energy = EnergyMeter(assembly.device.kind)

    def _reactions(self, lag: int) -> Reactions:
        training = self.assembly.recipe.training
        rows = len(self.assembly.data.train) / self.assembly.resolved.steps_per_epoch
        noticing = Noticing(
            self.assembly.recipe.watch,
            clip=training.max_grad_norm,
            span=span_of(rows, int(training.warmup_steps)),
            scaled=self.trainer.scaler.enabled,
            name_rows=self._name_rows,
        )
        return Reactions(
            self.assembly.recipe,
            noticing,
            self.skipped,
            self.record,
            lag=lag,
            sources=self._sources,
            stop=self._stop_for,
        )

    @property
    def interventions(self) -> Interventions:
        return self.reactions.interventions

    @property
    def ended_early(self) -> bool:
        """Whether the held-out loss has ended the run."""
        return self.reactions.early.stopped is not None

    def evaluate_start(self) -> None:
        """Held-out loss of the quantized base: the adapter adds nothing before step 1, or nothing
        that the base lacks; only LoftQ's has to be switched off for it."""
        if self.assembly.data.held_out:
            with self.trainer.model.adapter_on(self.assembly.recipe.lora.init != "loftq"):
                self._measure(0, "quantized base")

    def go_on_from(self, state: CheckpointState, best: dict[str, Tensor] | None) -> None:
        """Remember what an earlier process knew at the checkpoint of ``state``."""
        self.best_step, self.best_loss, self.best_adapter = state.best_step, state.best_loss, best
        if state.held_out_loss is not None:
            self._last_loss = (state.step, state.held_out_loss)
        self._submitted = self._saved = state.step
        self.skipped.count = state.skipped
        self.reactions.go_on_from(state.interventions, state.watching)

    def keep_start(self) -> None:
        """Remember how a run begins, where it may have to go back there."""
        if self.reactions.may_go_back:
            self._start = Point(self._state(0), HostCopies().copy(self.trainer.state()), None)

    def go_back(self, back: GoBackError) -> int:
        """Put everything back to the last checkpoint before a step whose batch is left out from
        now on; returns the step of that checkpoint."""
        self.finish_saving()
        point, _, damaged = newest_point(self.folder)
        for what in damaged:
            self.record(Warned(f"{what}; going back to an earlier one"))
        point = point or self._start
        if point is None:
            raise RunError(
                f"{self.folder} holds no checkpoint to go back to any more; start the run again."
            )
        self.trainer.load_state(point.tensors)
        self.interventions.go_back_to(point.state.step)
        self.record(RolledBack(back.step, point.state.step, back.why))
        self.go_on_from(replace(point.state, interventions=self.interventions.plain()), point.best)
        return point.state.step

    def needs_state(self, step: int) -> bool:
        """Whether something that follows ``step`` must find the weights that it left."""
        return self._evaluates(step) or self._checkpoints(step)

    def note_step(self, step: FinishedStep) -> None:
        """Emit the step's event. Raises DivergenceError where training cannot go on, GoBackError
        where it is to go on from the last checkpoint, and whatever kept that from being written."""
        self._note_written()
        in_use, reserved = self._memory()
        self.record(
            Step(
                step=step.number,
                epoch=step.number / self.assembly.resolved.steps_per_epoch,
                loss=step.loss,
                learning_rate=self._rate(step.number),
                grad_norm=step.grad_norm,
                tokens=step.tokens,
                labels=step.labels,
                seconds=step.seconds,
                memory_bytes=in_use,
                skipped=not step.updated,
                reserved_bytes=reserved,
                left_out=self.interventions.leaves_out(step.number),
            )
        )
        self.reactions.step(step)

    def evaluate(self, step: FinishedStep) -> None:
        """Held-out loss where the recipe wants it, and after the last step."""
        if not self._evaluates(step.number):
            return
        loss = self._measure(step.number, "adapter")
        self._last_loss = (step.number, loss)
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_step, self.best_loss = step.number, loss
            self.best_adapter = self.trainer.adapter()
        self.reactions.evaluation(step.number, loss)

    def checkpoint(self, step: FinishedStep) -> None:
        """A checkpoint where the recipe wants one, and after the last step."""
        if self._checkpoints(step.number):
            self.save(step.number)

    def save(self, step: int) -> None:
        """Begin to write the checkpoint of ``step``, unless that was done.

        Raises DivergenceError where the adapter is not finite: every checkpoint is a good one.
        """
        if self._submitted == step:
            return
        began = time.perf_counter()
        self.lock.check()
        self.finish_saving()  # the memory that is copied into is then free again
        if not torch.isfinite(self.trainer.parameters.data).all():
            reason = f"the adapter is no longer finite after step {step:,}"
            self._stop(Diverged(step, reason, [], self._last_checkpoint()), updated=True)
        snapshot = Snapshot(
            state=self._state(step),
            tensors=self._copies.copy(self.trainer.state()),
            best=None if self.best_step in (None, step) else self.best_adapter,
            weights=self.assembly.weights.result,
            folder=self.folder,
            files=GOES_ON_WITH,
            events_bytes=(self.folder / EVENTS_FILE).stat().st_size,
        )
        self.writer.submit(snapshot)
        self._submitted = step
        self._stood_still = time.perf_counter() - began

    def _state(self, step: int) -> CheckpointState:
        return CheckpointState(
            run_id=self.assembly.run_id,
            step=step,
            held_out_loss=self.last_loss(step),
            best_step=self.best_step,
            best_loss=self.best_loss,
            versions=package_versions(),
            device=self.assembly.device.name,
            hashes=self.assembly.hashes,
            skipped=self.skipped.count,
            interventions=self.interventions.plain(),
            watching=self.reactions.state(),
        )

    def finish_saving(self) -> None:
        """Return when every checkpoint that was begun is whole on the disk."""
        self.writer.wait()
        self._note_written()

    def _note_written(self) -> None:
        self.copies.tell()
        for written in self.writer.poll():
            state = written.state
            self._saved = state.step
            self._start = None  # nobody goes back there any more
            path = f"{written.path.parent.name}/{written.path.name}"
            self.record(
                Checkpointed(
                    state.step, path, state.held_out_loss, written.seconds, self._stood_still
                )
            )
            self.copies.copy(written)

    def last_loss(self, step: int) -> float | None:
        """The held-out loss of ``step``, if that was the last one measured."""
        return self._last_loss[1] if self._last_loss and self._last_loss[0] == step else None

    def note_energy(self) -> None:
        """Emit the energy of the steps where the machine reports it."""
        energy = self._energy.read()
        if energy is not None:
            self.record(energy)

    def _sources(self, step: FinishedStep) -> list[int]:
        """The number of the source of each of the step's rows; empty where there is one."""
        if not self.assembly.recipe.data.sources:
            return []
        parts, rows = self.assembly.batches.positions(step.number), self.assembly.data.train_rows
        return [rows[at].source for part in parts for at in part.tolist()]

    def _name_rows(self, step: FinishedStep) -> str:
        paths = [source.path for source in self.assembly.recipe.data.sources]
        return named_rows(step.rows, self._sources(step), paths)

    def _evaluates(self, step: int) -> bool:
        every = int(self.assembly.recipe.evaluation.every_steps)
        if not self.assembly.data.held_out or not every:
            return False
        return step % every == 0 or step == self.assembly.resolved.steps

    def _checkpoints(self, step: int) -> bool:
        every = int(self.assembly.recipe.checkpoints.every_steps)
        return step % every == 0 or step == self.assembly.resolved.steps

    def _rate(self, step: int) -> float:
        """The learning rate of ``step``; one that makes no update does not advance the schedule."""
        factors = self.interventions.factors(step)
        if self._rates is None or self._rates[0] != factors:
            self._rates = factors, self.interventions.rates(self._schedule, step).tolist()
        return self._rates[1][step - 1 - self.skipped.count]

    def _last_checkpoint(self) -> str | None:
        self.finish_saving()
        return f"checkpoints/step-{self._saved}" if self._saved else None

    def _stop(self, event: Diverged, *, updated: bool) -> NoReturn:
        self.record(event)
        path = str(self.folder / event.checkpoint) if event.checkpoint else None
        scaled = self.trainer.scaler.enabled
        raise DivergenceError(sentence(event.reason, path, updated=updated, scaled=scaled))

    def _stop_for(self, noticed: Noticed, updated: bool, limit: str) -> NoReturn:
        checkpoint = self._last_checkpoint()
        reason = f"{noticed.text}, and {limit}" if limit else noticed.text
        event = Diverged(noticed.step, reason, noticed.rows, checkpoint, noticed.sources)
        if noticed.name in ("loss_not_finite", "gradient_not_finite"):
            self._stop(event, updated=updated)
        self.record(event)
        path = str(self.folder / checkpoint) if checkpoint else None
        raise DivergenceError(stop_sentence(noticed, limit, path))

    def _measure(self, step: int, what: str) -> float:
        self.record.work.mark("held-out loss")
        with self.record.timed() as seconds:
            found = held_out_loss(
                self.trainer.model, self.assembly.data.held_out, after_batch=self.record.work.mark
            )
        self.record(Evaluated(step, what, found.loss, found.labels, found.rows, seconds()))
        return found.loss

    def _memory(self) -> tuple[int, int | None]:
        """Bytes in use, and on a GPU those that PyTorch has taken for it, both at their peak."""
        if self.assembly.device.kind == "cuda":
            stats = torch.cuda.memory_stats()
            return int(stats["allocated_bytes.all.peak"]), int(stats["reserved_bytes.all.peak"])
        return int(self._process.memory_info().rss), None
