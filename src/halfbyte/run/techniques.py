"""What each technique did in this run, in figures, for the report."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from halfbyte.data.batch import Batch, TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.engine.saved import saved_bytes
from halfbyte.events.types import Choice, Technique
from halfbyte.model.causal import QLoRAModel
from halfbyte.plan.resolve import PAGED_FROM
from halfbyte.recipe import Recipe

_WORDS = {
    "bf16": "bfloat16, which has the range of fp32 and needs no loss scaling",
    "fp16": "float16, with the loss scaled so that small gradients do not vanish",
    "fp32": "float32 throughout",
}


def techniques(
    recipe: Recipe,
    model: QLoRAModel,
    choices: Sequence[Choice],
    rows: Sequence[TokenizedRow],
    batch: Batch,
    optimizer_bytes: int,
) -> list[Technique]:
    """One event each for gradient checkpointing, mixed precision and the optimizer.

    ``rows`` are the training rows, ``batch`` the first micro-batch, ``optimizer_bytes`` what the
    optimizer's state takes.
    """
    return [
        _checkpointing(bool(recipe.training.gradient_checkpointing), model, rows, batch),
        _precision(recipe, model, choices),
        _optimizer(recipe, model, choices, optimizer_bytes),
    ]


def _checkpointing(
    on: bool, model: QLoRAModel, rows: Sequence[TokenizedRow], batch: Batch
) -> Technique:
    whole, recomputed, now = _kept(on, model, rows, batch)
    figures = {
        "tokens": float(len(batch.input_ids)),
        "bytes kept without": whole,
        "bytes kept with": recomputed,
        "bytes saved": whole - now,
    }
    tokens = f"{len(batch.input_ids):,} tokens"
    if now < whole:
        which = "Each layer was"
        if model.fused is not None and now > recomputed:
            count, layers = model.fused.recomputed_layers, len(model.fused.layers)
            which = f"{count} of {layers} layers were"
        text = (
            f"{which} computed again in the backward pass, so that a batch of {tokens} kept "
            f"{now / 1e6:,.0f} MB and not {whole / 1e6:,.0f} MB."
        )
    else:
        text = (
            f"Off: a batch of {tokens} keeps {whole / 1e6:,.0f} MB, which fits; recomputing would "
            f"have saved {(whole - recomputed) / 1e6:,.0f} MB and cost a third more time."
        )
    return Technique("gradient checkpointing", now < whole, text, figures)


def _kept(
    on: bool, model: QLoRAModel, rows: Sequence[TokenizedRow], batch: Batch
) -> tuple[float, float, float]:
    """Bytes that ``batch`` keeps with no layer recomputed, with all, and as the run does it."""
    if model.fused is not None:
        fused = model.fused
        count, found = fused.recomputed_layers, []
        for recomputed in (0, len(fused.layers), count):
            fused.recompute_layers(recomputed)
            found.append(float(fused.kept_bytes(batch)))
        return found[0], found[1], found[2]
    # Counted on the shortest row, then scaled by positions, padding included: what is kept grows
    # with them, and a batch kept whole without recomputing might not fit, hence it may be on.
    short = make_batch([min(rows, key=len)])
    model.use_gradient_checkpointing(False)
    whole = saved_bytes(model, short)
    model.use_gradient_checkpointing(True)
    recomputed = saved_bytes(model, short)
    model.use_gradient_checkpointing(on)
    scale = len(batch.input_ids) / len(short.input_ids)
    return whole * scale, recomputed * scale, (recomputed if on else whole) * scale


def _precision(recipe: Recipe, model: QLoRAModel, choices: Sequence[Choice]) -> Technique:
    reason = _reason(choices, "precision")
    rest = torch.float32 if recipe.quantization.upcast_rest else model.compute_dtype
    mixed = recipe.precision != "fp32"
    text = f"Products in {_WORDS[str(recipe.precision)]}"
    if mixed:
        stored = model.network.get_input_embeddings().weight.dtype
        wide, narrow = (str(dtype).removeprefix("torch.") for dtype in (rest, stored))
        text += f"; the adapter in fp32, norms and embeddings in {wide}"
        if stored != rest:
            text += f" (embeddings kept in the {narrow} that they are stored in: the same numbers)"
    return Technique("mixed precision", mixed, f"{text}{': ' + reason if reason else ''}.")


def _optimizer(
    recipe: Recipe, model: QLoRAModel, choices: Sequence[Choice], state_bytes: int
) -> Technique:
    name = recipe.training.optimizer
    parameters = model.lora_parameters().values()
    count = sum(p.numel() for p in parameters)
    largest = max(p.numel() for p in parameters)
    in_fp32 = 8 * count
    text = f"{name}: {state_bytes / 1e6:,.1f} MB of state for {count:,} parameters"
    if name != "adamw":
        text += f", where 32-bit moments would take {in_fp32 / 1e6:,.1f} MB"
    asked = next((c.asked for c in choices if c.key == "training.optimizer"), name)
    if "paged" in name:
        text += "; they lie in main memory, where the GPU reads and writes them"
    elif "paged" in str(asked):
        what = (
            f"the largest trained matrix has {largest:,} elements and pages are only used from "
            f"{PAGED_FROM:,}"
            if largest < PAGED_FROM
            else "the state is small enough to stay where the adapter is"
        )
        text += f"; nothing is really paged in this run: {what}"
    figures = {"bytes": float(state_bytes), "bytes in fp32": float(in_fp32)}
    return Technique("optimizer", True, text + ".", figures)


def _reason(choices: Sequence[Choice], key: str) -> str:
    return next((c.reason for c in choices if c.key == key), "").rstrip(".")
