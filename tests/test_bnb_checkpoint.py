"""Checkpoints that bitsandbytes has quantized, against its and transformers' own reading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

pytest.importorskip("bitsandbytes")

from bitsandbytes.functional import QuantState, quantize_4bit

from family_case import FAMILIES, bitsandbytes_folder, save_family
from halfbyte import Recipe, train
from halfbyte.data.batch import TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.errors import ModelError
from halfbyte.events import read_events
from halfbyte.events.types import Choice, Evaluated, ModelLoaded
from halfbyte.kernels.choice import PLAIN
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.fused import FusedNetwork, NotFusedError
from halfbyte.model.load import LoadedBase, load_base
from halfbyte.model.lora_init import LowRankStart
from halfbyte.model.source import open_model
from halfbyte.plan.memory import Setup, weight_bytes
from halfbyte.plan.parameters import model_shape
from halfbyte.quant.dense import DenseWeight
from halfbyte.quant.nf4 import NF4Weight
from halfbyte.recipe.schema import ModelRecipe, QuantizationRecipe

# Another form than each of the checkpoints below has, which must make no difference.
ASKED = {
    double: QuantizationRecipe(block_size=256, double_quant=not double) for double in (True, False)
}


FORMS: dict[str, dict[str, Any]] = {
    "single": {"bnb_4bit_use_double_quant": False},
    "double": {"bnb_4bit_use_double_quant": True},
    "stored as bf16": {
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "some left out": {
        "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": ["lm_head", "o_proj", "model.layers.1.mlp"],
    },
}


@pytest.fixture(scope="module")
def original(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(FAMILIES["qwen 2.5"].make, tiny_model, tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module", params=FORMS)
def folder(
    request: pytest.FixtureRequest, original: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    where = tmp_path_factory.mktemp("quantized")
    return bitsandbytes_folder(original, where, **FORMS[request.param])


def loaded(folder: Path, quantization: QuantizationRecipe) -> LoadedBase:
    return load_base(
        open_model(ModelRecipe(name=str(folder))),
        quantization=quantization,
        device="cpu",
        compute_dtype=torch.float32,
        rest_dtype=torch.float32,
    )


def test_it_is_loaded_as_it_is(folder: Path) -> None:
    """Codes and scales as bitsandbytes has them, logits as transformers' own loading gives them."""
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype == torch.bfloat16
    source = open_model(ModelRecipe(name=str(folder)))
    stored = source.stored_nf4
    assert stored is not None
    base = loaded(folder, ASKED[stored.double_quant])
    model = QLoRAModel(base.model, {}, torch.float32)
    in_bytes = 0
    for name, layer in model.linears.items():
        weight = theirs.get_submodule(name).weight
        state = getattr(weight, "quant_state", None)
        if state is None:
            assert isinstance(layer.base, DenseWeight)
            assert f"{name}.weight" not in stored.quantized
            assert torch.equal(layer.weight_dense(), weight)
            continue
        assert isinstance(layer.base, NF4Weight)
        packed = weight.data.contiguous().view(torch.uint8).view(-1)
        assert torch.equal(layer.base.codes, packed), name
        assert torch.equal(layer.base.absmax, state.absmax), name
        assert layer.base.block_size == state.blocksize == stored.block_size
        if stored.double_quant:
            assert torch.equal(layer.base.nested, state.state2.absmax), name
            assert torch.equal(layer.base.offset, state.offset), name
        else:
            assert layer.base.nested is None
        in_bytes += layer.base.nbytes
    assert base.bytes_after == in_bytes > 0
    assert base.quantized_modules == len(stored.quantized)

    ids = np.random.default_rng(0).integers(3, 300, 30).astype(np.int32)
    with torch.no_grad():
        in_fp32(theirs)
        wanted = theirs(input_ids=torch.from_numpy(ids).long()[None]).logits[0]
        got = model.logits(make_batch([TokenizedRow(ids, np.zeros(30, dtype=bool), 0)]))
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()

    shape = model_shape(source.config, "m", stored)
    setup = Setup("fp32", True, stored.block_size, stored.double_quant, 4, "all-linear", "adamw")
    rotary = sum(b.nbytes for name, b in base.model.named_buffers() if "inv_freq" in name)
    assert weight_bytes(shape, setup) == base.bytes_after + base.bytes_other - rotary
    if shape.left_out:
        assert "16 bits" in str(shape.not_fused)
        with pytest.raises(NotFusedError, match="keeps some of its linear layers in 16 bits"):
            FusedNetwork(model.network, model.head, torch.float32, PLAIN)
    else:
        assert shape.not_fused is None


def in_fp32(network: Any) -> None:
    """Have transformers' model compute in fp32, with weights that are not rounded to bf16 first."""
    for module in network.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and getattr(parameter, "quant_state", None) is None:
                parameter.data = parameter.data.float()
        if state is not None:
            state.dtype = module.compute_dtype = torch.float32


def test_the_blocks_are_of_its_own_size(original: Path, tmp_path: Path) -> None:
    """Made by hand with bitsandbytes' functions, since transformers sets no block size."""
    folder = bitsandbytes_folder(original, tmp_path, **FORMS["double"])
    tensors, originals = (
        load_file(folder / "model.safetensors"),
        load_file(original / "model.safetensors"),
    )
    states: dict[str, QuantState] = {}
    for name in [n for n in tensors if f"{n}.absmax" in tensors]:
        for part in [n for n in tensors if n.startswith(f"{name}.")]:
            del tensors[part]
        codes, states[name] = quantize_4bit(originals[name], blocksize=128, quant_type="nf4")
        described = states[name].as_dict(packed=True)
        tensors |= {name: codes} | {f"{name}.{part}": t for part, t in described.items()}
    save_file(tensors, folder / "model.safetensors")
    base = loaded(folder, QuantizationRecipe())
    for name, state in states.items():
        weight = base.model.get_submodule(name.removesuffix(".weight")).base
        assert weight.block_size == 128
        assert torch.equal(weight.absmax, state.absmax)


def test_a_run_tells_what_the_checkpoint_decides(
    original: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    folder = bitsandbytes_folder(original, tmp_path / "model", **FORMS["single"])
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(folder)},
            "data": {"path": str(tiny_rows), "held_out": 4},
            "lora": {"r": 4},
            "quantization": {"block_size": 128},
            "training": {"batch_size": 4, "max_steps": 2},
            "evaluation": {"every_steps": 1, "prompts": 0},
        }
    )
    run = train(recipe, out=tmp_path / "run", runs=tmp_path)
    events = [record.event for record in read_events(run.folder)]
    told = {e.key: (e.asked, e.value) for e in events if isinstance(e, Choice)}
    assert told["quantization.block_size"] == (128, 64)
    assert told["quantization.double_quant"] == (True, False)
    assert told["evaluation.base_loss"] == (True, False)
    measured = {e.what for e in events if isinstance(e, Evaluated)}
    assert measured == {"quantized base", "adapter"}
    (model,) = [e for e in events if isinstance(e, ModelLoaded)]
    assert model.quantized_modules == 14
    assert (run.folder / "report.pdf").exists() or (run.folder / "report.html").exists()


def test_an_adapter_that_starts_at_the_original_weights_is_refused(
    original: Path, tmp_path: Path
) -> None:
    source = open_model(
        ModelRecipe(name=str(bitsandbytes_folder(original, tmp_path, **FORMS["single"])))
    )
    with pytest.raises(ModelError, match="in 4 bits already"):
        load_base(
            source,
            quantization=QuantizationRecipe(),
            device="cpu",
            compute_dtype=torch.float32,
            rest_dtype=torch.float32,
            hook=LowRankStart("pissa", {}, {}, 0),
        )


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q.update(bnb_4bit_quant_type="fp4"), "bitsandbytes fp4"),
        (lambda q: q.pop("bnb_4bit_quant_type"), "bitsandbytes fp4"),
        (
            lambda q: q.update(load_in_4bit=False, _load_in_4bit=False, load_in_8bit=True),
            "bitsandbytes 8-bit",
        ),
        (lambda q: q.update(quant_method="awq"), "awq"),
    ],
)
def test_other_methods_are_refused(
    change: Callable[[dict[str, Any]], Any], words: str, original: Path, tmp_path: Path
) -> None:
    folder = bitsandbytes_folder(original, tmp_path, **FORMS["single"])
    edited(folder, change)
    with pytest.raises(ModelError, match=rf"quantized already \({words}\)") as error:
        open_model(ModelRecipe(name=str(folder)))
    assert ". " not in str(error.value)


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{NAME}.absmax"), "lacks its absmax"),
        (lambda t: t.update({f"{NAME}.absmax": t[f"{NAME}.absmax"][:-1]}), "holds codes or scales"),
        (lambda t: t.update({NAME: t[NAME][:-2]}), "holds codes or scales"),
        (lambda t: t[f"{NAME}.quant_map"].mul_(0.5), "another code book than NF4's"),
        (lambda t: t[f"{NAME}.nested_quant_map"].mul_(0.5), "scales in another form"),
        (lambda t: t[f"{NAME}.quant_state.bitsandbytes__nf4"].zero_(), "is not described as NF4"),
    ],
)
def test_a_damaged_one_is_refused(
    change: Callable[[dict[str, Any]], Any], words: str, original: Path, tmp_path: Path
) -> None:
    folder = bitsandbytes_folder(original, tmp_path, **FORMS["double"])
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=words) as error:
        loaded(folder, QuantizationRecipe())
    assert NAME in str(error.value)
