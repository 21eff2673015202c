"""Which adapters fused layers have, and that the others say why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.data.batching import make_batch
from halfbyte.kernels.choice import PLAIN
from halfbyte.model.fused import FusedNetwork, NotFusedError
from halfbyte.plan.device import Device
from halfbyte.plan.parameters import model_shape
from halfbyte.plan.resolve import setup_of
from halfbyte.recipe.load import parse_recipe
from halfbyte.recipe.schema import LoraRecipe
from lora_case import Pass, make_rows, our_model, our_pass, put, save_models
from oracle.fused import fuse

FUSED: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True, "r": 16},
    "a pattern": {"target_modules": r"model\.layers\.1\.(self_attn|mlp)\.(q|o|up)_proj"},
    "all but some": {"exclude_modules": ["0.mlp.down_proj", "k_proj"]},
    "Gaussian A": {"init": "gaussian"},
}
PLAIN_ONLY: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "lora.use_dora"),
    "ranks": ({"rank_pattern": {"q_proj": 2}}, "lora.rank_pattern"),
    "ranks of layers": ({"rank_pattern": {r"layers\.1\..*": 2}}, "lora.rank_pattern"),
    "factors": ({"alpha_pattern": {r"layers\.1\..*": 2.0}}, "lora.alpha_pattern"),
}
H100 = Device("cuda", "H100", 85 * 10**9, 80 * 10**9, (9, 0), True, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory, "qwen2")["qwen2"]


def lora_of(settings: dict[str, Any]) -> LoraRecipe:
    return LoraRecipe(**{"r": 4, "lora_alpha": 8.0} | settings)


@pytest.mark.parametrize("case", FUSED)
def test_fused_layers_do_the_same(case: str, folder: Path) -> None:
    model = our_model(folder, lora_of(FUSED[case]))
    put(model.lora_parameters())
    plain = our_pass(model, make_rows())
    flat = fuse(model, PLAIN)
    flat.grad.zero_()
    put(model.lora_parameters())
    model.adapter_changed()
    loss = model.loss_and_gradients(make_batch(make_rows()), torch.ones(()))
    fused = Pass(loss.item(), flat.views(flat.grad))
    assert fused.loss == pytest.approx(plain.loss, rel=1e-6)
    for name, gradient in plain.gradients.items():
        assert (fused.gradients[name] - gradient).norm() < 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("case", PLAIN_ONLY)
def test_what_is_not_fused_is_named(case: str, folder: Path) -> None:
    settings, names = PLAIN_ONLY[case]
    model = our_model(folder, lora_of(settings))
    with pytest.raises(NotFusedError, match=names.replace(".", r"\.")):
        FusedNetwork(model.network, model.head, torch.float32, PLAIN)
    # The plan, which has no model yet, must know it too.
    recipe = parse_recipe("model: {name: m}\ndata: {path: d}\nprecision: bf16\n", "r.yaml")
    shape = model_shape(model.network.config)
    assert setup_of(recipe, shape, H100, upcast_rest=True).fused
    recipe.lora = lora_of(settings)
    assert not setup_of(recipe, shape, H100, upcast_rest=True).fused
