"""From a recipe to everything that a run needs but the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from halfbyte.data.audit.findings import refuse_errors
from halfbyte.data.batch import Bucket
from halfbyte.data.batching import Batches
from halfbyte.data.packing import Packs
from halfbyte.data.prepare import Prepared, prepare
from halfbyte.data.source import is_here
from halfbyte.errors import RunError
from halfbyte.events.types import Audited, Event, PhaseProgress, Warned
from halfbyte.model.source import ModelSource, context_length, open_model
from halfbyte.model.weight_hashes import WeightHashes
from halfbyte.plan.buckets import batch_sizes, choose_buckets
from halfbyte.plan.device import Device, environment_event, find_device
from halfbyte.plan.resolve import Resolved, resolve
from halfbyte.recipe import Recipe
from halfbyte.run.fingerprint import data_hashes
from halfbyte.run.record import RunRecord
from halfbyte.run.strategy import Strategy
from halfbyte.trackers.choose import choose

# What making one more graph costs: a step run eagerly, and one more recorded.
CAPTURE_SECONDS = 0.15
DECIDED_ANEW = "how steps are made is decided anew, and sums may be rounded in other ways"
NOT_THE_SAME = (
    "the rest would not be bit for bit what it would have been; --allow machine goes on all the "
    "same"
)


@dataclass(frozen=True)
class Assembly:
    """A run with every setting decided and its rows tokenized."""

    recipe: Recipe  # effective: no "auto" is left
    source: ModelSource
    data: Prepared
    device: Device
    resolved: Resolved
    earlier: Strategy | None = None  # how the run made its steps before it was interrupted
    packs: Packs | None = None  # of the rows that train, where the recipe packs them
    run_id: str = ""

    @cached_property
    def batches(self) -> Batches:
        """The training rows by optimizer step; on a GPU padded to the run's buckets."""
        return self._batches(self.buckets)

    @cached_property
    def buckets(self) -> list[Bucket] | None:
        """The shapes of the run's batches; None on a CPU, where any shape is as good."""
        if self.earlier is not None:
            return self.earlier.buckets
        if self.device.kind == "cpu":
            return None
        sizes = batch_sizes(self._batches(None), self.resolved.steps)
        return choose_buckets(
            sizes,
            seconds_per_token=self.resolved.seconds_per_token,
            capture_seconds=CAPTURE_SECONDS,
            multiple=64,
        )

    def _batches(self, buckets: list[Bucket] | None) -> Batches:
        training = self.recipe.training
        return Batches(
            self.data.train,
            int(training.batch_size),
            int(training.gradient_accumulation),
            self.recipe.seed,
            buckets,
            self.packs,
        )

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of rows and data files; made once, since it reads every row."""
        return data_hashes(self.data)

    @cached_property
    def weights(self) -> WeightHashes:
        """The hashes of the base model's files; asked for first, they begin to be made."""
        return WeightHashes(self.source.files())


def assemble(
    recipe: Recipe,
    emit: RunRecord,
    *,
    recipe_folder: Path | None = None,
    tell: bool = True,
    earlier: Strategy | None = None,
    only_here: bool = False,
    run_id: str = "",
) -> Assembly:
    """Find the device, open the model, prepare the rows and decide what was left open.

    Paths in the recipe are looked for from the working directory and then from
    ``recipe_folder``; the effective recipe has them as they were found, so that a run can be
    resumed and asked from where it was made. ``tell=False`` leaves the choices unsaid, for a run
    that goes on with choices made before; steps are then made as ``earlier`` says, unless the
    machine or the software is another one, which with ``only_here`` raises RunError.
    """
    asked_path, recipe = recipe.data.name, located_recipe(recipe, recipe_folder)
    device = find_device(recipe.device)
    emit(environment_event(device))
    with emit.phase("model"):
        source = open_model(recipe.model)
    with emit.phase("tokenize"):
        data = prepare(
            recipe,
            source.tokenizer,
            context_length(source.config),
            progress=lambda done, rows: emit.tell(PhaseProgress("tokenize", done, rows)),
        )
        packs = None
        if recipe.data.packing:
            packs = Packs(data.train.lengths, data.max_length, recipe.seed)
    resolved = resolve(
        recipe,
        device=device,
        model_config=source.config,
        rows=len(data.train),
        max_length=data.max_length,
        held_out=len(data.held_out_rows),
        template=data.template.name,
        formats=data.formats,
        train=data.train,
        packs=packs,
        stored=source.stored_nf4,
    )
    if earlier is not None:
        reason = earlier.why_not_here(device)
        if reason is None:
            resolved = replace(
                resolved,
                recomputed_layers=earlier.recomputed_layers,
                copied_layers=earlier.copied_layers,
            )
        elif only_here:
            raise RunError(f"{reason}, so {NOT_THE_SAME}.")
        else:
            emit(Warned(f"{reason}: {DECIDED_ANEW}"))
            earlier = None
    audit = replace(data.audit, source=asked_path)
    if data.funnel is not None:
        emit(data.funnel)
    emit(audit)
    if tell:
        for choice in [*data.choices, *resolved.choices]:
            emit(choice)
        for finding in data.findings:
            emit(finding)
        for text in [*data.warnings, *resolved.warnings]:
            emit(Warned(text))
        refuse_errors(asked_path, data.findings)
    return Assembly(resolved.recipe, source, data, device, resolved, earlier, packs, run_id)


def located_recipe(recipe: Recipe, folder: Path | None) -> Recipe:
    """``recipe`` with its paths as they are found, from here or from ``folder``."""
    model = recipe.model.model_copy(update={"name": _located(recipe.model.name, folder)})
    sources = [
        source.model_copy(update={"path": _located(source.path, folder)})
        for source in recipe.data.sources
    ]
    paths: dict[str, Any] = {"sources": sources}
    for key in ("path", "held_out_path"):
        path = getattr(recipe.data, key)
        paths[key] = None if path is None else _located(path, folder)
    data = recipe.data.model_copy(update=paths)
    return recipe.model_copy(update={"model": model, "data": data})


def _located(name: str, folder: Path | None) -> str:
    """``name``, or where it lies beside the recipe if only there."""
    if folder is not None and not is_here(name) and is_here(name, folder):
        return str(folder / name)
    return name


@dataclass(frozen=True)
class Rehearsal:
    """What a run would do."""

    recipe: Recipe
    steps: int
    audit: Audited
    events: list[Event] = field(default_factory=list)


def rehearse(
    recipe: Recipe,
    *,
    max_steps: int | None = None,
    recipe_folder: Path | None = None,
    listeners: Sequence[Any] = (),
) -> Rehearsal:
    """Everything before the weights are read: nothing is written."""
    choose(recipe.trackers)
    events: list[Event] = []
    emit = RunRecord([events.append, *listeners])
    assembly = assemble(with_max_steps(recipe, max_steps), emit, recipe_folder=recipe_folder)
    return Rehearsal(assembly.recipe, assembly.resolved.steps, assembly.data.audit, events)


def with_max_steps(recipe: Recipe, max_steps: int | None) -> Recipe:
    """``recipe`` with ``--max-steps`` put in."""
    if max_steps is None:
        return recipe
    training = recipe.training.model_copy(update={"max_steps": max_steps})
    return recipe.model_copy(update={"training": training})
