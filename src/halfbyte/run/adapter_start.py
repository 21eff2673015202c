"""How a run's adapter starts, where it starts from the weights, and what becomes of that start.

With PiSSA the frozen weights are not those of the base model but what was left of them when the
first A and B were taken out. The run folder keeps these two in ``initial_adapter``, so that the
same is left when the run goes on or is asked; the adapter that is saved has them in it, at twice
the rank, and belongs on the base model as it is.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import ModelError
from halfbyte.model.adapter_files import SavedAdapter, read_adapter, save_adapter
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.lora_init import LowRankStart, Pair, of_residual, on_original
from halfbyte.model.lora_targets import (
    adapter_ranks,
    adapter_scales,
    choose_targets,
    saved_targets,
)
from halfbyte.model.skeleton import build_skeleton, quantized_linears
from halfbyte.model.source import ModelSource
from halfbyte.recipe import Recipe
from halfbyte.recipe.schema import LoraRecipe
from halfbyte.run.assembly import Assembly

FOLDER = "initial_adapter"


def low_rank_start(
    recipe: Recipe, source: ModelSource, begun: Path | None = None
) -> LowRankStart | None:
    """What makes A and B of the weights as these are quantized; None where nothing is to be made.

    ``begun`` is the folder of a run whose adapter is put in next: PiSSA's start is read from it,
    and LoftQ's, of which the weights know nothing, is left out. Raises ModelError where the weights
    as they were before quantization are not there.
    """
    lora = recipe.lora
    pissa = lora.init.startswith("pissa")
    if not pissa and (lora.init != "loftq" or begun is not None):
        return None
    if source.stored_nf4 is not None:
        raise ModelError(
            f"lora.init is {lora.init}, which is made of the weights as they were before "
            f"quantization, and {source.name} holds 4-bit ones; name the original model, or "
            "--set lora.init=kaiming."
        )
    linears = quantized_linears(build_skeleton(source.config, source.name))
    chosen = choose_targets(linears, lora.target_modules, lora.exclude_modules)
    ranks = adapter_ranks(chosen, lora.r, lora.rank_pattern)
    for name, rank in ranks.items():
        most = min(linears[name].weight.shape)
        if rank > most:
            raise ModelError(
                f"lora.init is {lora.init}, and {name} has {most} singular values, fewer than its "
                f"adapter's rank {rank}; --set lora.r={min(16, most)}."
            )
    scales = adapter_scales(ranks, float(lora.lora_alpha), lora.alpha_pattern, lora.use_rslora)
    known = read_adapter(begun / FOLDER).layers if begun is not None else None
    return LowRankStart(lora.init, ranks, scales, recipe.seed, known)


def save_start(folder: Path, assembly: Assembly, model: QLoRAModel) -> None:
    """Keep PiSSA's start in the run's ``folder``; nothing where there is none."""
    initial = model.initial()
    if initial:
        save_adapter(
            folder / FOLDER,
            initial,
            base_name=assembly.source.name,
            **_settings(assembly.recipe.lora, model, rows=False),
        )


def saved_adapter(lora: LoraRecipe, model: QLoRAModel) -> tuple[dict[str, Pair], dict[str, Any]]:
    """The adapter as it is saved, for the base model as it is: layers, and settings by name."""
    layers, settings = model.adapter(), _settings(lora, model)
    initial = model.initial()
    if not initial:
        return layers, settings
    # alpha / r, or alpha / √r, stays what it is.
    times = math.sqrt(2.0) if lora.use_rslora else 2
    settings |= {
        "r": 2 * lora.r,
        "lora_alpha": times * settings["lora_alpha"],
        "rank_pattern": {name: 2 * r for name, r in lora.rank_pattern.items()},
        "alpha_pattern": {name: times * alpha for name, alpha in lora.alpha_pattern.items()},
    }
    return {name: on_original(pair, initial[name]) for name, pair in layers.items()}, settings


@torch.no_grad()
def put_saved(model: QLoRAModel, saved: SavedAdapter) -> None:
    """Put what :func:`saved_adapter` gave into ``model``, from a file.

    Raises ModelError where the file does not hold the start that the model was quantized with, or
    not all that is trained.
    """
    for rows in model.rows.values():
        found = (saved.modules if rows.whole else saved.token_rows).get(rows.name)
        if found is None or found.shape != rows.values.shape:
            raise ModelError(
                f"the adapter does not hold the trained rows of {rows.name}: it is not of this "
                "recipe."
            )
        rows.values.copy_(found)
    layers, initial = saved.layers, model.initial()
    if initial:
        both = {name: of_residual(pair) for name, pair in layers.items()}
        layers = {name: trained for name, (trained, _) in both.items()}
        for name, (_, start) in both.items():
            if not all(torch.equal(a, b.cpu()) for a, b in zip(start, initial[name], strict=True)):
                raise ModelError(
                    f"the adapter did not start at what the run's {FOLDER} holds for {name}: the "
                    "two files are not of one run."
                )
    model.put_adapter(layers, saved.magnitudes)


def _settings(lora: LoraRecipe, model: QLoRAModel, rows: bool = True) -> dict[str, Any]:
    return {
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": saved_targets(list(model.lora), model.linears),
        "use_rslora": lora.use_rslora,
        "rank_pattern": lora.rank_pattern,
        "alpha_pattern": lora.alpha_pattern,
        "use_dora": lora.use_dora,
        "magnitudes": model.magnitudes(),
        **(_rows(model) if rows else {}),
    }


def _rows(model: QLoRAModel) -> dict[str, Any]:
    """What is trained of embedding and head; of a matrix that is both, PEFT wants both."""
    whole = [rows for rows in model.rows.values() if rows.whole]
    some = [rows for rows in model.rows.values() if not rows.whole]
    return {
        "modules": {
            name: rows.values for rows in whole for name in (rows.name, rows.tied_to) if name
        },
        "token_rows": {rows.name: rows.values for rows in some},
        "token_ids": {rows.name: rows.ids for rows in some},
        "ensure_weight_tying": any(rows.tied_to for rows in whole),
    }
