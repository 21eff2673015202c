"""PiSSA and LoftQ against PEFT's: the start, what is frozen, gradients, and the adapter saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

import peft
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from halfbyte import Recipe
from halfbyte.errors import ModelError
from halfbyte.evaluate.held_out import unquantized_loss
from halfbyte.events.types import Event, PhaseProgress
from halfbyte.model.adapter_files import read_adapter, save_adapter
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.load import load_base
from halfbyte.model.lora import attach_lora
from halfbyte.model.lora_init import LowRankStart, of_residual, on_original, randomized_svd
from halfbyte.model.source import open_model
from halfbyte.plan.device import find_device
from halfbyte.quant.nf4 import NF4Weight, quantize_nf4
from halfbyte.recipe.schema import LoraRecipe, ModelRecipe, QuantizationRecipe
from halfbyte.run.adapter_start import low_rank_start, put_saved, saved_adapter
from halfbyte.run.record import RunRecord
from halfbyte.run.setup import load_model
from lora_case import (
    assert_same,
    make_rows,
    our_logits,
    our_pass,
    peft_logits,
    peft_parameters,
    peft_pass,
    quantized,
    save_models,
    settings_of,
)

TARGETS = ["q_proj", "v_proj", "down_proj"]
WAYS: dict[str, dict[str, Any]] = {
    "scale 1": {"r": 4, "lora_alpha": 4},
    "scale 2": {"r": 4, "lora_alpha": 8},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}, "lora_alpha": 8},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory, "llama")["llama"]


def lora_of(init: str, **settings: Any) -> LoraRecipe:
    return LoraRecipe(**{"r": 4, "target_modules": TARGETS, "init": init} | settings)


def model_of(folder: Path, lora: LoraRecipe, begun: Path | None = None) -> QLoRAModel:
    """Ours, put together as a run does it."""
    values = {"model": {"name": str(folder)}, "data": {"path": "rows.jsonl"}, "lora": lora}
    source = open_model(ModelRecipe(name=str(folder)))
    start = low_rank_start(Recipe.model_validate(values), source, begun)
    loaded = load_base(
        source,
        quantization=QuantizationRecipe(),
        device="cpu",
        compute_dtype=torch.float32,
        rest_dtype=torch.float32,
        hook=start,
    )
    layers = attach_lora(
        loaded.model, seed=3, start=None if start is None else start.pairs, **settings_of(lora)
    )
    return QLoRAModel(loaded.model, layers, torch.float32)


def pissa_of_peft(folder: Path, lora: LoraRecipe) -> Any:
    """PEFT's PiSSA of the model in fp32."""
    settings = lora.model_dump(exclude={"init", "modules_to_save"})
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(**settings, init_lora_weights=lora.init, task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config)


@torch.no_grad()
def train_a_little(parameters: dict[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(8)
    for name in sorted(parameters):
        p = parameters[name]
        p += 0.1 * p.std() * torch.randn(p.shape, generator=generator)


def original(folder: Path, name: str) -> Tensor:
    return load_file(folder / "model.safetensors")[f"{name}.weight"]


@pytest.mark.parametrize("init", ["pissa", "loftq", "kaiming"])
def test_those_who_watch_hear_how_far_it_is(
    init: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.run.record.TOLD_EVERY", 0.0)
    heard: list[Event] = []
    recipe = Recipe.model_validate(
        {"model": {"name": str(folder)}, "data": {"path": "x"}, "precision": "fp32"}
        | {"lora": lora_of(init, lora_alpha=8)}
    )
    source, record = open_model(recipe.model), RunRecord([heard.append])
    model, _ = load_model(recipe, source, find_device("cpu"), copied_layers=0, record=record)
    matrices = len(model.linears)
    assert heard == [
        PhaseProgress("quantize", done, matrices, "matrices") for done in range(1, matrices + 1)
    ]


def test_progress_is_told_ten_times_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("halfbyte.run.record.time.perf_counter", lambda: clock)
    heard: list[Event] = []
    tell = RunRecord([heard.append]).progress("quantize", "matrices")
    for done in range(1, 101):
        clock = done / 32
        tell(done, 100)
    # The first tick of 1/32 s that lies 0.1 s behind the last one told.
    assert [event.done for event in heard if isinstance(event, PhaseProgress)] == [
        *range(4, 101, 4)
    ]


@pytest.mark.parametrize("way", WAYS)
def test_pissa_starts_as_pefts_and_freezes_the_rest(way: str, folder: Path, tmp_path: Path) -> None:
    lora = lora_of("pissa", **WAYS[way])
    ours, theirs = model_of(folder, lora), pissa_of_peft(folder, lora)
    expected = peft_parameters(theirs)
    for name, parameter in ours.lora_parameters().items():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-5)
    # What PEFT leaves of the weights, quantized by bitsandbytes, is what ours has frozen.
    rest = theirs.unload()
    rest.save_pretrained(tmp_path)
    plain = lora.model_dump(exclude={"init", "modules_to_save"})
    again = peft.get_peft_model(
        quantized(tmp_path), peft.LoraConfig(**plain, task_type="CAUSAL_LM")
    ).train()
    with torch.no_grad():
        for name, parameter in peft_parameters(again).items():
            parameter.copy_(ours.lora_parameters()[name])
    for name, layer in ours.lora.items():
        whole = original(folder, name)
        assert layer.initial is not None
        a, b = layer.initial
        left = torch.linalg.svdvals(whole - layer.scale * b @ a)
        torch.testing.assert_close(left[0], torch.linalg.svdvals(whole)[len(a)], rtol=1e-4, atol=0)
        frozen = layer.base.dequantize(torch.float32)
        # Without the adapter it is the whole weight, better than plain NF4 has it.
        lost = (frozen + layer.scale * b @ a - whole).norm()
        plain_loss = (quantize_nf4(whole).dequantize(torch.float32) - whole).norm()
        assert lost < plain_loss
    rows = make_rows()
    for model_parameters in (ours.lora_parameters(), peft_parameters(again)):
        train_a_little(model_parameters)
    assert_same(our_pass(ours, rows), peft_pass(again, rows))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_pissa_is_saved_for_the_base_as_it_is(
    way: str, rslora: bool, folder: Path, tmp_path: Path
) -> None:
    """PEFT on the original model must give what PiSSA's own model gives, in fp32."""
    lora, rows = lora_of("pissa", use_rslora=rslora, **WAYS[way]), make_rows()
    ours, theirs = model_of(folder, lora), pissa_of_peft(folder, lora)
    for parameters in (ours.lora_parameters(), peft_parameters(theirs)):
        train_a_little(parameters)
    layers, settings = saved_adapter(lora, ours)
    save_adapter(tmp_path, layers, base_name=str(folder), **settings)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    got = peft_logits(tmp_path, base, rows)
    with torch.no_grad():
        ids = [torch.from_numpy(row.input_ids).long()[None] for row in rows]
        expected = torch.cat([theirs.eval()(input_ids=i, use_cache=False).logits[0] for i in ids])
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = torch.cat([base(input_ids=i, use_cache=False).logits[0] for i in ids])
    assert (expected - plain).abs().max() > 0.02 * expected.abs().max()
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()

    # Read again, it is what was trained; and a model that started elsewhere refuses it.
    trained = {n: p.clone() for n, p in ours.lora_parameters().items()}
    with torch.no_grad():
        for p in ours.lora_parameters().values():
            p.zero_()
    put_saved(ours, read_adapter(tmp_path))
    assert all(torch.equal(p, trained[n]) for n, p in ours.lora_parameters().items())
    name = next(iter(ours.lora))
    a, b = ours.lora[name].initial  # type: ignore[misc]
    ours.lora[name].initial = (a * 2, b)
    with pytest.raises(ModelError, match="not of one run"):
        put_saved(ours, read_adapter(tmp_path))


def test_what_was_left_is_left_again_from_the_first_a_and_b(folder: Path, tmp_path: Path) -> None:
    """Whatever the decomposition gives another time: the codes are the same, bit for bit."""
    lora = lora_of("pissa_niter_16", lora_alpha=8)
    first = model_of(folder, lora)
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": TARGETS}
    save_adapter(tmp_path / "initial_adapter", first.initial(), base_name="base", **settings)
    second = model_of(folder, lora, begun=tmp_path)
    for name, layer in first.linears.items():
        for part, tensor in layer.base.tensors().items():
            assert torch.equal(second.linears[name].base.tensors()[part], tensor)
    assert our_logits(first, make_rows()).equal(our_logits(second, make_rows()))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_loftq_is_pefts_decomposition_of_what_is_lost(scale: float) -> None:
    weight = torch.randn(192, 128, generator=torch.Generator().manual_seed(1))
    start = LowRankStart("loftq", {"layer": 16}, {"layer": scale}, seed=0)
    frozen = start("layer", weight, quantize_nf4)
    plain = quantize_nf4(weight)
    assert all(torch.equal(t, plain.tensors()[n]) for n, t in frozen.tensors().items())
    lost = weight - plain.dequantize(torch.float32)
    theirs = _low_rank_decomposition(lost, reduced_rank=16)
    a, b = start.pairs["layer"]
    torch.testing.assert_close(a * scale**0.5, theirs["R"], rtol=0, atol=1e-5)
    torch.testing.assert_close(b * scale**0.5, theirs["L"], rtol=0, atol=1e-5)
    assert (lost - scale * b @ a).norm() < 0.9 * lost.norm()


def test_loftq_brings_the_quantized_model_nearer_to_the_original(folder: Path) -> None:
    rows = make_rows()
    ours = model_of(folder, lora_of("loftq", r=32, lora_alpha=64, target_modules="all-linear"))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = [torch.from_numpy(row.input_ids).long()[None] for row in rows]
        whole = torch.cat([base(input_ids=i, use_cache=False).logits[0] for i in ids])
    started = our_logits(ours, rows)
    with ours.adapter_on(False):
        quantized_alone = our_logits(ours, rows)
    assert (started - whole).norm() < 0.7 * (quantized_alone - whole).norm()


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_the_random_subspace_comes_near_to_the_best(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    u, _ = torch.linalg.qr(torch.randn(shape[0], 96, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(shape[1], 96, generator=generator))
    matrix = u * torch.linspace(3.0, 0.1, 96).pow(2) @ v.t()
    u, s, vh = randomized_svd(matrix, 8, 16, generator)
    best = torch.linalg.svdvals(matrix)
    # The first are exact; those at the border mix with the next, which are nearly as large.
    torch.testing.assert_close(s[:4], best[:4], rtol=1e-3, atol=0)
    torch.testing.assert_close(s, best[:8], rtol=0.05, atol=0)
    assert (matrix - u * s @ vh).norm() < 1.005 * best[8:].norm()
    torch.testing.assert_close(u.t() @ u, torch.eye(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(vh @ vh.t(), torch.eye(8), rtol=0, atol=1e-5)
    u, s, vh = randomized_svd(matrix, 8, 0, generator)  # without iterations it is not near
    assert (matrix - u * s @ vh).norm() > 1.03 * best[8:].norm()


def test_the_conversion_and_its_way_back() -> None:
    generator = torch.Generator().manual_seed(3)
    pairs = [(torch.randn(4, 6, generator=generator), torch.randn(5, 4, generator=generator))] * 2
    trained, initial = pairs[0], (pairs[1][0] * 2, pairs[1][1] - 1)
    a, b = on_original(trained, initial)
    torch.testing.assert_close(b @ a, trained[1] @ trained[0] - initial[1] @ initial[0])
    back = of_residual((a, b))
    assert all(
        torch.equal(x, y)
        for p, q in zip(back, (trained, initial), strict=True)
        for x, y in zip(p, q, strict=True)
    )


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_the_base_before_quantization_has_no_part_twice(init: str, folder: Path) -> None:
    ours, rows = model_of(folder, lora_of(init, lora_alpha=8)), make_rows()
    source = open_model(ModelRecipe(name=str(folder)))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = peft_pass(base.requires_grad_(True), rows).loss
    found = unquantized_loss(ours, rows, source.read)
    assert found.loss * found.labels == pytest.approx(expected, rel=1e-5)
    if init == "pissa":
        assert ours.initial().keys() == ours.lora.keys()


def test_a_rank_that_no_weight_has_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="32 singular values, fewer than its adapter's rank 64"):
        model_of(folder, lora_of("pissa", r=64, lora_alpha=64))


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_checkpoint_in_4_bits_has_no_weights_to_start_from(init: str) -> None:
    class InFourBits:
        name, stored_nf4 = "some-4bit", object()

    values = {"model": {"name": "m"}, "data": {"path": "d"}, "lora": {"init": init}}
    with pytest.raises(ModelError, match="some-4bit holds 4-bit ones; name the original model"):
        low_rank_start(Recipe.model_validate(values), InFourBits())  # type: ignore[arg-type]


def test_what_is_not_adapted_is_quantized_as_ever() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    found: NF4Weight = LowRankStart("pissa", {}, {}, 0)("other", weight, quantize_nf4)
    assert torch.equal(found.codes, quantize_nf4(weight).codes)
