"""Every "auto" of a recipe decided, once, with a reason.

What the recipe states is done as stated. Resolving a resolved recipe changes nothing, so that a
run can go on from its own recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.batching import Batches
from halfbyte.data.packing import Packs
from halfbyte.events.types import Choice
from halfbyte.kernels import triton_shim
from halfbyte.model.bnb_checkpoint import StoredNF4
from halfbyte.model.fusable import TRAINED_ENDS, why_adapters_not_fused
from halfbyte.model.lora_targets import adapter_ranks, adapter_scales, choose_targets
from halfbyte.plan import defaults
from halfbyte.plan.buckets import ROUNDED_TO, batch_sizes
from halfbyte.plan.decisions import Decisions
from halfbyte.plan.device import Device
from halfbyte.plan.experts import about_experts, refuse_experts
from halfbyte.plan.memory import Setup, optimizer_bytes, weight_bytes
from halfbyte.plan.parameters import ModelShape, model_shape
from halfbyte.plan.precision import choose_precision
from halfbyte.plan.reasons import (
    accumulation_reason,
    copies,
    copy_reason,
    packing_reason,
    recompute_reason,
)
from halfbyte.plan.speed import device_speed, step_seconds
from halfbyte.plan.stored import as_stored
from halfbyte.plan.strategy import (
    PassSize,
    Way,
    budget,
    choose_way,
    gigabytes,
    possible_batches,
    ways,
)
from halfbyte.plan.units import Units
from halfbyte.plan.warn import warnings_of
from halfbyte.recipe import Recipe

# bitsandbytes pages the state of a parameter of at least so many elements.
PAGED_FROM = 100_000
LOSS_AT_STEPS = "eight, spread over the steps that were made"


@dataclass(frozen=True)
class Resolved:
    """``recipe`` with every setting decided, and what follows from it.

    ``recomputed_layers`` are computed again in the backward pass, and of ``copied_layers`` the
    weights are also kept dequantized; that changes no number, only time and memory, and so is no
    setting. ``seconds_per_token`` is what a token more in a batch is expected to cost, and
    ``embedding_on_host`` says whether a GPU is to fetch embeddings from main memory.
    """

    recipe: Recipe
    steps: int
    steps_per_epoch: int
    choices: list[Choice]
    warnings: list[str]
    recomputed_layers: int
    copied_layers: int
    seconds_per_token: float
    embedding_on_host: bool = False


def resolve(
    recipe: Recipe,
    *,
    device: Device,
    model_config: Any,
    rows: int,
    max_length: int,
    held_out: int,
    template: str | None = None,
    formats: Sequence[str] = (),
    train: Sequence[TokenizedRow] = (),
    packs: Packs | None = None,
    stored: StoredNF4 | None = None,
) -> Resolved:
    """Decide what ``recipe`` leaves open.

    ``model_config`` is transformers'; ``rows`` the rows that train, ``held_out`` those that do
    not, ``max_length`` the longest row in tokens, ``template`` the template's name and ``formats``
    those of the sources, as the data room has decided and told of them. With the rows that
    ``train`` memory is planned for the largest batch that they make, and without them for batches
    of nothing but longest rows.
    ``packs`` are those of the rows where they are packed; what a batch, a step and an epoch count
    are then packs. ``stored`` says how the model is in 4 bits already, if it is. Raises ModelError
    for target modules that the model lacks.
    """
    shape = model_shape(model_config, recipe.model.name, stored)
    refuse_experts(recipe.lora, shape)
    decided = Decisions.of(recipe)
    decide_device(decided, device)
    for choice in [] if stored is None else as_stored(recipe, stored):
        decided.set(choice.key, choice.value, choice.reason)
    _put_data(decided, max_length, held_out, template, formats)
    decided.tell_defaults()
    decided.choices += about_experts(shape)
    decided.auto("lora.lora_alpha", lambda: defaults.lora_alpha(decided.recipe.lora))
    decided.auto("training.learning_rate", lambda: defaults.learning_rate(shape.frozen))
    units = Units(rows, packs)
    largest = _LargestPass(decided.recipe, train, units, max_length, device)
    way, fits = _decide_way(decided, shape, device, largest, units)
    on_host = False
    if not fits:
        on_host, way = _decide_embedding(decided, shape, device, way)
        fits = way.memory.total <= budget(device, decided.recipe.memory_limit_gb).bytes
    way, fits = _decide_optimizer(decided, shape, device, way, fits)
    per_epoch, total = _decide_steps(decided, units)
    if packs is not None:
        decided.choices.append(Choice("data.packing", True, True, packing_reason(packs)))
    _decide_watch(decided, total, held_out)
    return Resolved(
        recipe=decided.recipe,
        steps=total,
        steps_per_epoch=per_epoch,
        choices=decided.choices,
        warnings=warnings_of(
            recipe,
            decided.recipe,
            device,
            shape,
            way=way,
            fits=fits,
            units=units,
            steps=total,
            held_out=held_out,
        ),
        recomputed_layers=way.recomputed_layers,
        copied_layers=way.copied_layers,
        seconds_per_token=_seconds_per_token(decided.recipe, shape, device, way, max_length),
        embedding_on_host=on_host,
    )


@dataclass(frozen=True)
class _LargestPass:
    """The largest pass of a run with so many rows in a pass and passes in a step."""

    recipe: Recipe
    train: Sequence[TokenizedRow]
    units: Units
    max_length: int
    device: Device

    def __call__(self, rows: int, passes: int) -> PassSize:
        if not self.train:
            tokens = rows * self.max_length
            return PassSize(tokens, tokens, self.max_length, 2 * rows)
        steps = _steps(self.recipe, self.units, rows * passes)[1]
        batches = Batches(self.train, rows, passes, self.recipe.seed, packs=self.units.packs)
        found = batch_sizes(batches, steps).largest
        if self.device.kind == "cpu":
            return PassSize(*found, batches.capacity)
        tokens, labels, longest = (-(-n // ROUNDED_TO) * ROUNDED_TO for n in found)
        # A batch in a bucket has room for as many rows of padding as may be needed.
        room = batches.capacity + -(-tokens // longest)
        return PassSize(tokens, min(tokens, labels), found[2], room)


def _seconds_per_token(
    recipe: Recipe, shape: ModelShape, device: Device, way: Way, row_tokens: int
) -> float:
    """What a token more costs: apart from that a pass has costs of its own, whatever its size."""
    setup = setup_of(recipe, shape, device, upcast_rest=bool(recipe.quantization.upcast_rest))
    one, two = (
        step_seconds(
            shape,
            setup,
            device_speed(device, setup.precision),
            tokens=tokens,
            row_tokens=row_tokens,
            passes=1,
            recomputed=way.recomputed_layers,
            copied=way.copied_layers,
        )
        for tokens in (way.tokens, 2 * way.tokens)
    )
    return (two - one) / way.tokens


def decide_device(decided: Decisions, device: Device) -> None:
    """What follows from the device alone."""
    here = f"{device.name} is here" if device.kind == "cuda" else "no GPU was found"
    decided.auto("device", lambda: (device.kind, here))
    decided.auto("precision", lambda: choose_precision(device))


def _put_data(
    decided: Decisions,
    max_length: int,
    held_out: int,
    template: str | None,
    formats: Sequence[str],
) -> None:
    data = decided.recipe.data
    if data.sources:
        for source, format in zip(data.sources, formats, strict=False):
            source.format = format  # type: ignore[assignment]
    elif formats:
        decided.put("data.format", formats[0])
    if decided.is_open("data.max_length"):
        decided.put("data.max_length", max_length)
    if decided.is_open("data.held_out"):
        decided.put("data.held_out", held_out)
    if template is not None and decided.is_open("data.template"):
        decided.put("data.template", template)


def _decide_way(
    decided: Decisions,
    shape: ModelShape,
    device: Device,
    largest: Callable[[int, int], PassSize],
    units: Units,
) -> tuple[Way, bool]:
    """Rows in a pass, recomputing, the type of the rest, and copies, by memory and time."""
    training, limit = decided.recipe.training, budget(device, decided.recipe.memory_limit_gb)
    batches = possible_batches(
        training.batch_size, training.gradient_accumulation, units.wanted_per_step
    )
    stated = training.gradient_checkpointing
    recompute = (False, True) if stated == "auto" else (bool(stated),)

    def best(upcast: bool) -> tuple[Way, bool, list[Way]]:
        setup = setup_of(decided.recipe, shape, device, upcast_rest=upcast)
        found = ways(
            shape,
            setup,
            device,
            limit,
            largest=largest,
            batches=batches,
            checkpointing=recompute,
        )
        return *choose_way(found, limit), found

    asked = decided.recipe.quantization.upcast_rest
    way, fits, found = best(asked is not False)
    if asked == "auto":
        if fits or decided.recipe.precision == "fp32":
            decided.set(
                "quantization.upcast_rest", True, _upcast_reason(decided.recipe, shape, device)
            )
        else:
            way, fits, found = best(False)
            decided.set(
                "quantization.upcast_rest",
                False,
                f"norms, embeddings and head in fp32 would not fit into {limit.words}",
            )
    if training.batch_size == "auto":
        words = f"{way.batch_size} × {way.gradient_accumulation} {units.words} a step"
        decided.set(
            "training.batch_size",
            way.batch_size,
            f"{words}; a pass of up to {way.tokens:,} tokens needs about "
            f"{gigabytes(way.memory.total)} of {limit.words}",
        )
    if training.gradient_accumulation == "auto":
        made = way.batch_size * way.gradient_accumulation
        decided.set(
            "training.gradient_accumulation",
            way.gradient_accumulation,
            accumulation_reason(made, units),
        )
    if training.gradient_checkpointing == "auto":
        decided.set(
            "training.gradient_checkpointing", *recompute_reason(way, found, fits, limit.words)
        )
    decided.choices.append(Choice("copies", None, copies(way), copy_reason(way, limit.words)))
    return way, fits


def _decide_embedding(
    decided: Decisions, shape: ModelShape, device: Device, way: Way
) -> tuple[bool, Way]:
    """Whether the embedding is kept in main memory, and what a step takes then.

    A GPU needs a few of its rows in a step. Only where nothing else makes a step fit: fetching
    them takes about 0.1 ms for 768 tokens of width 2,048. A head that is the embedding is needed
    whole.
    """
    rows = shape.ends - shape.head
    trained = decided.recipe.lora.modules_to_save or decided.recipe.model.new_tokens
    if device.kind != "cuda" or rows <= 0 or trained:
        return False, way
    recipe = decided.recipe
    setup = setup_of(recipe, shape, device, upcast_rest=bool(recipe.quantization.upcast_rest))
    saved = rows * (setup.compute if shape.stored == setup.precision else setup.rest)
    decided.choices.append(
        Choice(
            "embedding",
            None,
            "in main memory",
            f"it takes {gigabytes(saved)}, of which a step needs a few rows, and memory is short",
        )
    )
    return True, replace(way, memory=replace(way.memory, weights=way.memory.weights - saved))


def setup_of(recipe: Recipe, shape: ModelShape, device: Device, *, upcast_rest: bool) -> Setup:
    """What of ``recipe``, its precision decided, the memory of a step follows from."""
    lora, block = recipe.lora, recipe.quantization.block_size
    whole_blocks = all(columns % block == 0 for _, columns in shape.linears.values())
    ranks = adapter_ranks(
        choose_targets(shape.linears, lora.target_modules, lora.exclude_modules),
        lora.r,
        lora.rank_pattern,
    )
    alpha = 1.0 if lora.lora_alpha == "auto" else lora.lora_alpha
    scales = adapter_scales(ranks, alpha, lora.alpha_pattern, lora.use_rslora)
    reason = shape.not_fused or why_adapters_not_fused(
        ranks.values(), scales.values(), lora.use_dora
    )
    trained_rows = shape.trained_rows(lora.modules_to_save, len(recipe.model.new_tokens))
    if trained_rows:
        reason = reason or TRAINED_ENDS
    fused = device.kind == "cuda" and reason is None and whole_blocks
    capability = device.capability or (0, 0)
    return Setup(
        precision=str(recipe.precision),
        upcast_rest=upcast_rest,
        block_size=recipe.quantization.block_size,
        double_quant=recipe.quantization.double_quant,
        r=lora.r,
        target_modules=lora.target_modules,
        exclude_modules=lora.exclude_modules,
        rank_pattern=lora.rank_pattern,
        use_dora=lora.use_dora,
        trained_rows=trained_rows,
        optimizer=recipe.training.optimizer,
        fused=fused,
        triton=triton_shim.INSTALLED and capability >= (7, 5),
        pads_rows=triton_shim.INSTALLED and (7, 5) <= capability < (8, 0),
    )


def _upcast_reason(recipe: Recipe, shape: ModelShape, device: Device) -> str:
    if recipe.precision == "fp32":
        return "everything is in fp32 here"
    wide, narrow = (
        weight_bytes(shape, setup_of(recipe, shape, device, upcast_rest=upcast))
        for upcast in (True, False)
    )
    return (
        "PEFT's prepare_model_for_kbit_training keeps norms, embeddings and head in fp32 too; it "
        f"costs {gigabytes(wide - narrow)} of weights"
    )


def _decide_optimizer(
    decided: Decisions, shape: ModelShape, device: Device, way: Way, fits: bool
) -> tuple[Way, bool]:
    """Whether the optimizer's state is paged: where a step does not fit with it on the GPU.

    Returns what a step takes then, and whether it fits.
    """
    recipe = decided.recipe
    if recipe.training.optimizer != "paged_adamw_8bit":
        return way, fits
    setup = setup_of(recipe, shape, device, upcast_rest=bool(recipe.quantization.upcast_rest))
    state = gigabytes(optimizer_bytes(shape, setup))
    largest = max(setup.trained(shape))
    if setup.triton and not fits and largest >= PAGED_FROM:
        decided.choices.append(
            Choice(
                "training.optimizer",
                "paged_adamw_8bit",
                "paged_adamw_8bit",
                f"its state ({state}) lies in main memory, where a GPU reads and writes it over "
                "the bus, since memory is short",
            )
        )
        way = replace(way, memory=replace(way.memory, optimizer=0))
        limit = budget(device, recipe.memory_limit_gb)
        return way, way.memory.total <= limit.bytes
    same = f"the same 8-bit AdamW, its state ({state}) not paged"
    if device.kind == "cpu":
        why = "a CPU has no second memory to page to"
    elif largest < PAGED_FROM:
        why = (
            f"the largest trained matrix has {largest:,} elements, and bitsandbytes too pages "
            f"only from {PAGED_FROM:,}"
        )
    else:
        why = "it is small enough to stay on the GPU, where paging would only slow it"
    decided.set("training.optimizer", "adamw_8bit", f"{same}: {why}")
    return way, fits


def _decide_steps(decided: Decisions, units: Units) -> tuple[int, int]:
    training = decided.recipe.training
    decided.auto("training.epochs", lambda: defaults.epochs(units.rows))
    per_step = int(training.batch_size) * int(training.gradient_accumulation)
    per_epoch, total = _steps(decided.recipe, units, per_step)
    if training.max_steps is not None:
        passes = training.max_steps / per_epoch
        of_epochs = defaults.steps(per_epoch, float(training.epochs))
        decided.choices.append(
            Choice(
                "training.max_steps",
                training.max_steps,
                training.max_steps,
                f"{passes:.3g} epochs, where training.epochs alone would make {of_epochs:,} steps",
            )
        )
    decided.auto("training.warmup_steps", lambda: defaults.warmup_steps(total))
    return per_epoch, total


def _steps(recipe: Recipe, units: Units, per_step: int) -> tuple[int, int]:
    """Steps of an epoch and of the run, of which each takes so many rows or packs."""
    training = recipe.training
    per_epoch = defaults.steps_per_epoch(units.count, per_step)
    if training.max_steps is not None:
        return per_epoch, defaults.bounded("training.max_steps", training.max_steps)
    epochs = defaults.epochs(units.rows)[0] if training.epochs == "auto" else training.epochs
    total = defaults.steps(per_epoch, float(epochs))
    return per_epoch, defaults.bounded("training.epochs", total)


def _decide_watch(decided: Decisions, total: int, held_out: int) -> None:
    recipe = decided.recipe
    decided.auto("evaluation.every_steps", lambda: defaults.evaluation_every(total, held_out))
    every = int(recipe.evaluation.every_steps)
    decided.auto("evaluation.keep", lambda: defaults.keep(held_out, every))
    decided.auto("checkpoints.every_steps", lambda: defaults.checkpoint_every(total, every))
    if decided.is_open("report.loss_at_steps"):  # stays open: a run may be interrupted
        decided.choices.append(Choice("report.loss_at_steps", "auto", "auto", LOSS_AT_STEPS))
