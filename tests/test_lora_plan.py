"""The plan counts what is really trained and kept, whatever kind of adapter it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halfbyte.data.batching import make_batch
from halfbyte.engine.saved import saved_bytes
from halfbyte.export.card.adapter_notes import adapter_notes
from halfbyte.model.source import open_model
from halfbyte.optim.choose import make_optimizer
from halfbyte.optim.flat import flatten_parameters
from halfbyte.plan import defaults
from halfbyte.plan.device import Device
from halfbyte.plan.memory import kept_bytes, optimizer_bytes
from halfbyte.plan.parameters import model_shape
from halfbyte.plan.resolve import setup_of
from halfbyte.recipe import Recipe
from halfbyte.recipe.schema import LoraRecipe, TrainingRecipe
from lora_case import make_rows, our_model, save_models

NEW = ["<tool>", "</tool>"]
BOTH = ["embed_tokens", "lm_head"]
# Family, settings of lora, new tokens.
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "plain": ("llama", {}, []),
    "DoRA": ("llama", {"use_dora": True}, []),
    "DoRA on some": ("qwen3", {"use_dora": True, "target_modules": ["v_proj", "down_proj"]}, []),
    "ranks": ("llama", {"rank_pattern": {"q_proj": 16}, "exclude_modules": ["o_proj"]}, []),
    "new tokens": ("llama", {}, NEW),
    "new tokens, tied": ("qwen3", {}, NEW),
    "both whole": ("llama", {"modules_to_save": BOTH}, NEW),
    "the head": ("llama", {"modules_to_save": ["lm_head"]}, NEW),
    "whole, tied": ("gemma3", {"modules_to_save": ["lm_head"]}, []),
}
CPU = Device("cpu", "c", 10**10, 10**10, None, False, 2)
H100 = Device("cuda", "H100", 85 * 10**9, 80 * 10**9, (9, 0), True, 16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory, "llama", "qwen3", "gemma3")


def recipe_of(folder: Path, lora: dict[str, Any], tokens: list[str]) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": str(folder), "new_tokens": tokens},
            "data": {"path": "rows.jsonl"},
            "precision": "fp32",
            "lora": {"r": 8, "lora_alpha": 16, **lora},
            "training": {"optimizer": "adamw_8bit"},
        }
    )


@pytest.mark.parametrize("case", CASES)
def test_what_is_trained_and_kept_is_counted(case: str, folders: dict[str, Path]) -> None:
    family, settings, tokens = CASES[case]
    recipe = recipe_of(folders[family], settings, tokens)
    model = our_model(folders[family], recipe.lora, new_tokens=tokens)
    shape = model_shape(open_model(recipe.model).config)
    setup = setup_of(recipe, shape, CPU, upcast_rest=True)
    trained = model.lora_parameters()
    assert sorted(setup.trained(shape)) == sorted(p.numel() for p in trained.values())

    kept = saved_bytes(model, make_batch(make_rows()))
    whole = sum(rows.values.nbytes for rows in model.rows.values() if rows.in_head)
    estimate = kept_bytes(shape, setup, tokens=61, checkpointing=False)
    assert 0.7 < estimate / (kept - whole) < 1.3

    flat = flatten_parameters(
        trained,
        full_state=[k for k, rows in model.rows.items() if rows.whole and rows.in_embedding],
    )
    optimizer = make_optimizer("adamw_8bit", flat, TrainingRecipe())
    state = sum(t.nbytes for n, t in optimizer.state_tensors().items() if t.numel() > 1)
    assert optimizer_bytes(shape, setup) == pytest.approx(state, rel=0.02)


@pytest.mark.parametrize("case", CASES)
def test_layers_are_fused_where_they_can_be(case: str, folders: dict[str, Path]) -> None:
    _, settings, tokens = CASES[case]
    recipe = recipe_of(folders["llama"], settings, tokens)
    shape = model_shape(open_model(recipe.model).config)
    assert setup_of(recipe, shape, H100, upcast_rest=True).fused == (case == "plain")


def test_alpha_that_is_left_open() -> None:
    assert defaults.lora_alpha(LoraRecipe(r=8))[0] == 16
    assert defaults.lora_alpha(LoraRecipe(r=8, init="pissa"))[0] == 8
    # rsLoRA's factor is that of plain LoRA at rank 16, and falls as the root of the rank.
    assert defaults.lora_alpha(LoraRecipe(r=16, use_rslora=True))[0] / 16**0.5 == 2
    assert defaults.lora_alpha(LoraRecipe(r=64, use_rslora=True))[0] / 64**0.5 == 1


def test_the_card_says_what_must_be_known_to_load_it(folders: dict[str, Path]) -> None:
    def notes(lora: dict[str, Any], tokens: list[str]) -> str:
        recipe = recipe_of(folders["llama"], lora, tokens)
        return " ".join(adapter_notes(recipe, open_model(recipe.model).new_tokens))

    assert notes({}, []) == ""
    assert "resize_token_embeddings(322)" in notes({}, NEW)
    assert "trained embeddings" in notes({}, NEW)
    assert "do not take DoRA and trained embeddings" in notes(
        {"use_dora": True, "modules_to_save": ["lm_head"]}, []
    )
    assert "twice the trained rank" in notes({"init": "pissa_niter_16"}, [])
    assert "in blocks of 64" in notes({"init": "loftq"}, [])
