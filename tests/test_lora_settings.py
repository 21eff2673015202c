"""Every kind of adapter is PEFT's: targets, ranks and factors, loss and gradients, and on disk."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

import peft
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from halfbyte.errors import ModelError
from halfbyte.model.lora_targets import adapter_ranks, adapter_scales, choose_targets, saved_targets
from halfbyte.recipe.schema import LoraRecipe
from lora_case import (
    assert_same,
    make_rows,
    our_logits,
    our_model,
    our_pass,
    peft_logits,
    peft_model,
    peft_parameters,
    peft_pass,
    put,
    quantized,
    save,
    save_models,
)

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
NAMES = [
    f"model.layers.{layer}.{block}.{leaf}"
    for layer in (0, 1, 11)
    for block, leaves in (("self_attn", ATTENTION), ("mlp", MLP))
    for leaf in leaves
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory, "llama", "qwen2")


# What a user may write: names, tails of names, whole names, and expressions that fit some.
TAILS = [*ATTENTION, *MLP, "self_attn.q_proj", "0.mlp.up_proj", "mlp", "proj", *NAMES[:3]]
EXPRESSIONS = [r".*\.mlp\..*", r"model\.layers\.1\..*", r".*(q|v)_proj", r".*\.1\..*", "q_proj"]
TARGETS = st.one_of(
    st.lists(st.sampled_from(TAILS), min_size=1, max_size=4), st.sampled_from(EXPRESSIONS)
)
KEYS = ["q_proj", "mlp.up_proj", r"1\.mlp\.down_proj", r"layers\.\d+\.mlp\.up_proj", "(k|v)_proj"]


@given(TARGETS, st.one_of(st.just([]), TARGETS))
@settings(max_examples=300, deadline=None)
def test_targets_are_pefts(targets: Any, excluded: Any) -> None:
    config = peft.LoraConfig(target_modules=targets, exclude_modules=excluded or None)
    config.target_modules, config.exclude_modules = targets, excluded  # no sets
    theirs = [name for name in NAMES if check_target_module_exists(config, name) is True] + [
        name for name in NAMES if isinstance(check_target_module_exists(config, name), re.Match)
    ]
    every = [
        *([targets] if isinstance(targets, str) else targets),
        *([excluded] if isinstance(excluded, str) else excluded),
    ]
    try:
        ours = choose_targets(NAMES, targets, excluded)
    except ModelError as error:
        # One of them fits nothing, or nothing is left: PEFT says nothing of the first.
        text = str(error)
        assert "\n" not in text
        assert not theirs or any(repr(one) in text for one in every)
        return
    assert sorted(ours) == sorted(theirs)
    saved = saved_targets(ours, NAMES)
    config.target_modules, config.exclude_modules = saved, None
    assert [n for n in NAMES if check_target_module_exists(config, n)] == ours


@given(st.dictionaries(st.sampled_from(KEYS), st.integers(1, 64), max_size=4))
@settings(max_examples=100, deadline=None)
def test_ranks_by_pattern_are_pefts(pattern: dict[str, int]) -> None:
    theirs = {name: pattern.get(get_pattern_key(list(pattern), name), 8) for name in NAMES}
    assert adapter_ranks(NAMES, 8, pattern) == theirs


def test_a_pattern_that_does_nothing_is_told_of() -> None:
    with pytest.raises(ModelError, match=r"rank_pattern has 'qproj'.*q_proj, k_proj"):
        adapter_ranks(NAMES, 8, {"qproj": 4})
    with pytest.raises(ModelError, match="alpha_pattern has 'lm_head'"):
        adapter_scales(dict.fromkeys(NAMES, 8), 16, {"lm_head": 4})
    with pytest.raises(ModelError, match="nothing would be trained"):
        choose_targets(NAMES, ["q_proj"], ["self_attn.q_proj"])
    with pytest.raises(ModelError, match=r"write lora.modules_to_save: \[lm_head\]"):
        choose_targets(NAMES, ["q_proj", "lm_head"])
    with pytest.raises(ModelError, match="fits none; a name here is model"):
        choose_targets(NAMES, r"layers\..*")


CASES: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True, "r": 16, "lora_alpha": 8.0},
    "a pattern": {"target_modules": r"model\.layers\.1\.(self_attn|mlp)\.(q|o|up)_proj"},
    "all but some": {"exclude_modules": ["0.mlp.down_proj", "k_proj"]},
    "ranks and factors": {
        "rank_pattern": {r"0\.self_attn\.q_proj": 12, "q_proj": 2, "down_proj": 16},
        "alpha_pattern": {"up_proj": 3.0, r"layers\.1\.self_attn\..*": 32},
    },
    "DoRA": {"use_dora": True},
    "DoRA, ranks and factors, rsLoRA": {
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"up_proj": 3.0},
        "exclude_modules": ["o_proj"],
    },
    "ranks and factors, rsLoRA": {
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"up_proj": 3.0},
    },
}


def recipe(case: str) -> LoraRecipe:
    return LoraRecipe(**{"r": 4, "lora_alpha": 8.0} | CASES[case])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_pefts_adapter(
    case: str, family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    lora, rows = recipe(case), make_rows()
    ours, theirs = our_model(folders[family], lora), peft_model(folders[family], lora)
    for parameters in (ours.lora_parameters(), peft_parameters(theirs)):
        put(parameters)
    ours.adapter_changed()
    assert_same(our_pass(ours, rows), peft_pass(theirs, rows))

    save(ours, tmp_path, lora, folders[family])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        expected = peft_logits(tmp_path, quantized(folders[family]), rows)
    got = our_logits(ours, rows)
    with ours.adapter_on(False):
        without = our_logits(ours, rows)
    assert (expected - without).abs().max() > 0.01 * expected.abs().max()
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_gaussian_is_drawn_as_pefts(folders: dict[str, Path]) -> None:
    lora = LoraRecipe(r=16, lora_alpha=16, init="gaussian")
    ours = our_model(folders["llama"], lora).adapter()
    theirs = peft_model(folders["llama"], lora, init_lora_weights="gaussian")
    a = torch.cat([a.flatten() for a, _ in ours.values()])
    b = torch.cat([p.flatten() for n, p in peft_parameters(theirs).items() if n.endswith("A")])
    assert a.shape == b.shape
    assert a.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert b.std().item() == pytest.approx(a.std().item(), rel=0.03)
    # A uniform distribution of this deviation would have a fourth moment of 1.8, not of 3.
    assert (a / a.std()).pow(4).mean().item() == pytest.approx(3.0, rel=0.1)
    assert all(b.count_nonzero() == 0 for _, b in ours.values())
