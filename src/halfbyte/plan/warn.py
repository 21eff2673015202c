"""What is done as stated, and is not a good idea here: one sentence each, with what is better."""

from __future__ import annotations

from halfbyte.data.packing import Packs, good_length
from halfbyte.plan.device import Device
from halfbyte.plan.experts import experts_warning
from halfbyte.plan.parameters import ModelShape
from halfbyte.plan.precision import precision_warning
from halfbyte.plan.strategy import Way, budget, gigabytes
from halfbyte.plan.units import Units
from halfbyte.recipe import Recipe

# A LoRA run above it usually diverges. Small models stand more: the demo's, of 135M parameters,
# ends at a held-out loss of 2.94 with 2e-3 and at 3.14, after as many tokens, with 1e-3.
HIGH_RATE, HIGH_RATE_SMALL = 1e-3, 5e-3
SMALL = 1_000_000_000
MANY_EPOCHS = 10
# Of fewer packs the last one may be half empty whatever is done.
WELL_FILLED, SOME_PACKS = 0.9, 10


def warnings_of(
    asked: Recipe,
    recipe: Recipe,
    device: Device,
    shape: ModelShape,
    *,
    way: Way,
    fits: bool,
    units: Units,
    steps: int,
    held_out: int,
) -> list[str]:
    """Warnings on ``asked``, whose resolved form is ``recipe``."""
    found = [
        precision_warning(asked.precision, device) if asked.precision != "auto" else None,
        _memory(asked, device, way, fits, units),
        _rate(recipe, shape),
        _warmup(recipe, steps),
        _rows(recipe, units),
        _fill(units.packs),
        _epochs(asked),
        _keep(asked, recipe, held_out),
        _early(recipe, held_out),
        _rank(asked, shape),
        experts_warning(asked.lora, shape),
    ]
    return [text for text in found if text]


def _memory(asked: Recipe, device: Device, way: Way, fits: bool, units: Units) -> str | None:
    need = gigabytes(way.memory.total)
    if fits:
        if way.memory.total <= device.free_bytes:
            return None
        return (
            f"a step needs about {need} and {gigabytes(device.free_bytes)} are free; end other "
            "programs that hold memory."
        )
    limit = budget(device, asked.memory_limit_gb)
    better = []
    if units.packs is not None and way.padding > way.memory.total - limit.bytes:
        better.append(
            f"--set data.packing=false, since {gigabytes(way.padding)} of it are attention's, "
            f"which on this GPU takes memory for {way.room.rows} rows a pass as if each had the "
            f"{way.room.longest:,} tokens of the longest"
        )
    if asked.training.gradient_checkpointing is False:
        better.append("--set training.gradient_checkpointing=true")
    if way.batch_size > 1:
        better.append(
            f"--set training.batch_size={max(1, way.batch_size // 4)} "
            f"--set training.gradient_accumulation={way.gradient_accumulation * 4}"
        )
    if not better:
        better.append("a smaller --set data.max_length or a smaller model")
    return (
        f"a pass of {way.tokens:,} tokens, the largest of {way.batch_size} {units.words}, needs "
        f"about {need}, more than there is ({limit.words}), and may run out of memory; try "
        f"{', or '.join(better)}."
    )


def _rate(recipe: Recipe, shape: ModelShape) -> str | None:
    rate = float(recipe.training.learning_rate)
    high = HIGH_RATE_SMALL if shape.frozen < SMALL else HIGH_RATE
    if rate <= high:
        return None
    return (
        f"training.learning_rate is {rate:g}; above {high:g} an adapter seldom learns and "
        "often diverges: --set training.learning_rate=2e-4 is usual."
    )


def _warmup(recipe: Recipe, steps: int) -> str | None:
    warmup = int(recipe.training.warmup_steps)
    if warmup < steps or warmup == 0:
        return None
    return (
        f"training.warmup_steps is {warmup} and the run has {steps} steps, so the learning rate "
        "never reaches its peak; --set training.warmup_steps=auto takes 3 %."
    )


def _rows(recipe: Recipe, units: Units) -> str | None:
    step = int(recipe.training.batch_size) * int(recipe.training.gradient_accumulation)
    if step <= units.count or recipe.training.max_steps is not None:
        return None
    return (
        f"a step takes {step} {units.words} and there are {units.count}: an epoch is one step; "
        f"--set training.batch_size={max(1, units.count // 8)} "
        "--set training.gradient_accumulation=1 makes more of them."
    )


def _fill(packs: Packs | None) -> str | None:
    if packs is None or packs.fill >= WELL_FILLED or packs.count < SOME_PACKS:
        return None
    return (
        f"packs of {packs.max_length:,} tokens are only {100 * packs.fill:.0f} % filled by rows of "
        f"{packs.tokens / packs.rows:,.0f} on average; "
        f"--set data.max_length={good_length(packs.tokens, packs.rows)} holds about eight of them."
    )


def _epochs(asked: Recipe) -> str | None:
    epochs = asked.training.epochs
    if epochs == "auto" or float(epochs) <= MANY_EPOCHS or asked.training.max_steps is not None:
        return None
    return (
        f"training.epochs is {epochs:g}; rows seen more than {MANY_EPOCHS} times are learned by "
        "heart: --set training.epochs=3 is usual."
    )


def _keep(asked: Recipe, recipe: Recipe, held_out: int) -> str | None:
    if asked.evaluation.keep != "best" or (held_out and recipe.evaluation.every_steps):
        return None
    return (
        "evaluation.keep is best, but no held-out loss is measured, so the last adapter is kept; "
        "--set data.held_out=auto --set evaluation.every_steps=auto measures it."
    )


def _early(recipe: Recipe, held_out: int) -> str | None:
    patience = recipe.evaluation.early_stopping.patience
    if patience is None or (held_out and recipe.evaluation.every_steps):
        return None
    return (
        f"evaluation.early_stopping.patience is {patience}, but no held-out loss is measured, so "
        "nothing ends the run early; --set data.held_out=auto --set evaluation.every_steps=auto "
        "measures it."
    )


def _rank(asked: Recipe, shape: ModelShape) -> str | None:
    most = min(min(pair) for pair in shape.linears.values())
    pattern = max(asked.lora.rank_pattern.values(), default=0)
    key, r = ("r", asked.lora.r) if asked.lora.r > most else ("rank_pattern", pattern)
    if r <= most:
        return None
    return (
        f"lora.{key} is {r}, more than the rank that the smallest adapted layer can have; "
        "--set lora.r=16 is usual."
    )
