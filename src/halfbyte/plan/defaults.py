"""What is done where the recipe says nothing, each with its reason.

The functions give (value, reason) of what follows from the rows, the model or other settings;
``FIXED`` holds the reasons of defaults that are the same for every run.
"""

from __future__ import annotations

import math
from fractions import Fraction

from halfbyte.errors import RecipeError
from halfbyte.recipe.schema import LoraRecipe

MOST_STEPS = 100_000_000  # there are tables with a number for each step
LARGE_MODEL = 13_000_000_000  # parameters from which the smaller learning rate holds

FIXED: dict[str, str] = {
    "quantization.type": "the 4-bit format of QLoRA, equal to bitsandbytes'",
    "quantization.block_size": "the block size of QLoRA and of bitsandbytes",
    "quantization.double_quant": "saves 0.37 bit a weight at no measurable loss",
    "lora.r": "enough for nearly all fine-tunes; more helps little and costs memory",
    "lora.lora_dropout": "a few epochs over an adapter this small seldom need it",
    "lora.target_modules": "adapting all linear layers is what matches full fine-tuning (QLoRA, "
    "section 4)",
    "data.loss_on": "the answer is what is to be learned; the question is given",
    "training.lr_scheduler": "a slow end lets the loss settle",
    "training.weight_decay": "LoRA's rank bounds the adapter already",
    "training.max_grad_norm": "keeps one odd batch from undoing the steps before it",
    "seed": "any number does; the same one gives the same run",
}


def learning_rate(parameters: int) -> tuple[float, str]:
    """2e-4, or 1e-4 for a base of 13B parameters and more."""
    if parameters >= LARGE_MODEL:
        return 1e-4, f"the usual rate of LoRA from 13B parameters up; this has {parameters:,}"
    return 2e-4, f"the usual rate of LoRA below 13B parameters; this has {parameters:,}"


def lora_alpha(lora: LoraRecipe) -> tuple[int, str]:
    """Twice the rank; 8 with rsLoRA, whose scale has to fall as the root of the rank; the rank
    with PiSSA."""
    if lora.use_rslora:
        return 8, f"with rsLoRA the adapter is scaled by 8 / √r: by 2 at rank 16 (r is {lora.r})"
    if lora.init.startswith("pissa"):
        return lora.r, f"r, so the adapter is scaled by 1, as PiSSA was made for (r is {lora.r})"
    return 2 * lora.r, f"2r, so the adapter is scaled by 2 whatever r is (r is {lora.r})"


def epochs(rows: int) -> tuple[int, str]:
    """3 below 2,000 rows, 2 below 20,000, else 1."""
    if rows < 2_000:
        return 3, f"{rows:,} rows are fewer than 2,000, and few rows need to be seen again"
    if rows < 20_000:
        return 2, f"{rows:,} rows are fewer than 20,000"
    return 1, f"{rows:,} rows are 20,000 or more, enough to be seen once"


def steps_per_epoch(rows: int, rows_per_step: int) -> int:
    """The last step of an epoch takes what is left, as in transformers' Trainer."""
    return -(-rows // rows_per_step)


def steps(per_epoch: int, passes: float) -> int:
    """Steps of ``passes`` epochs, rounded up; 0.07 epochs of 100 steps are 7, not 8."""
    return max(1, math.ceil(Fraction(str(passes)) * per_epoch))


def bounded(key: str, total: int) -> int:
    """``total`` steps, which ``key`` asks for. Raises RecipeError where there are too many."""
    if total > MOST_STEPS:
        raise RecipeError(
            f"{key} asks for more than {MOST_STEPS:,} steps; --set training.max_steps to fewer."
        )
    return total


def warmup_steps(total: int) -> tuple[int, str]:
    """3 % of the steps and at least 5, but never more than half of a short run."""
    wanted = max(5, math.ceil(Fraction(3, 100) * total))
    if wanted > total // 2:
        return total // 2, f"5 steps would be more than half of a run of {total}"
    if wanted == 5:
        return 5, f"at least 5 steps; 3 % of {total:,} would be fewer"
    return wanted, f"3 % of {total:,} steps"


def evaluation_every(total: int, held_out: int) -> tuple[int, str]:
    """About ten evaluations a run, none where no row is held out."""
    if held_out == 0:
        return 0, "no rows are held out"
    return math.ceil(total / 10), f"about ten evaluations in {total:,} steps"


def checkpoint_every(total: int, evaluate_every: int) -> tuple[int, str]:
    """At each evaluation, or ten a run."""
    if evaluate_every:
        return evaluate_every, "at each evaluation"
    return math.ceil(total / 10), f"about ten checkpoints in {total:,} steps"


def keep(held_out: int, evaluate_every: int) -> tuple[str, str]:
    """The best where it can be known."""
    if held_out and evaluate_every:
        return "best", "the last adapter of several epochs is often not the best one"
    return "last", "no held-out loss is measured, by which a best one could be told"
