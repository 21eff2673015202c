"""A mixture's experts in NF4: each against a slow reference, and what is counted of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

pytest.importorskip("bitsandbytes")

from bitsandbytes import functional

from family_case import FAMILIES, SHAPE, bitsandbytes_folder, save_family
from halfbyte import Recipe, train
from halfbyte.data.batch import TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.engine.saved import saved_bytes
from halfbyte.errors import ModelError
from halfbyte.evaluate.held_out import unquantized_loss
from halfbyte.events import read_events
from halfbyte.events.types import Checked, Choice, Evaluated, ModelLoaded
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.experts import DOWN, UP, NF4Experts
from halfbyte.model.host_reads import HostReads
from halfbyte.model.load import LoadedBase, load_base
from halfbyte.model.lora_init import LowRankStart
from halfbyte.model.source import open_model
from halfbyte.plan.experts import about_experts, experts_warning, refuse_experts
from halfbyte.plan.memory import Setup, activation_bytes, kept_bytes, weight_bytes
from halfbyte.plan.parameters import model_shape
from halfbyte.quant.dense import DenseWeight
from halfbyte.recipe.load import parse_recipe
from halfbyte.recipe.schema import LoraRecipe, ModelRecipe, QuantizationRecipe
from halfbyte.run.assembly import rehearse
from oracle.case import Case
from oracle.ours import load

MAKE = FAMILIES["qwen 3 moe"].make


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(MAKE, tiny_model, tmp_path_factory.mktemp("experts"))


def loaded(folder: Path, *, double: bool = True, **more: Any) -> LoadedBase:
    return load_base(
        open_model(ModelRecipe(name=str(folder))),
        quantization=QuantizationRecipe(double_quant=double),
        device="cpu",
        compute_dtype=torch.float32,
        rest_dtype=torch.float32,
        **more,
    )


def mixtures(base: LoadedBase) -> dict[str, NF4Experts]:
    return {n: m for n, m in base.model.named_modules() if isinstance(m, NF4Experts)}


def rows(*lengths: int) -> list[TokenizedRow]:
    random = np.random.default_rng(5)
    return [
        TokenizedRow(random.integers(3, 300, n).astype(np.int32), np.ones(n, dtype=bool), i)
        for i, n in enumerate(lengths)
    ]


def test_how_far_loading_is_counts_every_matrix(folder: Path) -> None:
    heard: list[tuple[int, int]] = []
    base = loaded(folder, progress=lambda done, total: heard.append((done, total)))
    matrices = base.quantized_modules
    of_experts = [6 * 2, 2 * 6 * 2]  # all of a layer's at once, then one linear layer at a time
    done = [*of_experts, *range(of_experts[-1] + 1, matrices + 1)]
    assert heard == [(n, matrices) for n in done]
    # A hook takes its time for linear layers alone.
    heard.clear()
    hook = LowRankStart("pissa", {}, {}, seed=0)
    loaded(folder, progress=lambda done, total: heard.append((done, total)), hook=hook)
    linears = matrices - of_experts[-1]
    assert heard == [(n, linears) for n in range(1, linears + 1)]


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("apart", [True, False], ids=["experts apart", "experts stacked"])
def test_each_expert_is_quantized_by_itself(
    double: bool, apart: bool, folder: Path, tmp_path: Path
) -> None:
    """Bit for bit as bitsandbytes quantizes that expert's matrix, were it a linear layer."""
    original = AutoModelForCausalLM.from_pretrained(folder)
    names = load_file(folder / "model.safetensors").keys()
    assert sum(".mlp.experts." in name for name in names) == 2 * 6 * 3
    where = folder
    if not apart:
        where = tmp_path
        for path in folder.iterdir():
            (where / path.name).write_bytes(path.read_bytes())
        save_file(original.state_dict(), where / "model.safetensors")
    base = loaded(where, double=double)
    nbytes = 0
    for name, module in mixtures(base).items():
        for which, matrices in module.matrices.items():
            for number, matrix in enumerate(matrices):
                one = original.get_submodule(name).get_parameter(which).data[number]
                codes, state = functional.quantize_4bit(
                    one, blocksize=64, compress_statistics=double, quant_type="nf4"
                )
                assert torch.equal(matrix.codes, codes.view(-1))
                assert torch.equal(matrix.absmax, state.absmax)
                wanted = functional.dequantize_4bit(codes, state)
                assert torch.equal(module.weight(which, number), wanted)
                nbytes += matrix.nbytes
    linears = [m for m in original.modules() if isinstance(m, torch.nn.Linear)]
    assert base.quantized_modules == len(linears) - 1 + 2 * 6 * 2
    assert base.parameters == original.num_parameters()
    assert 0 < nbytes < base.bytes_after

    shape = model_shape(original.config)
    assert shape.frozen == original.num_parameters()
    setup = Setup("fp32", True, 64, double, 4, "all-linear", "adamw")
    rotary = sum(b.nbytes for n, b in base.model.named_buffers() if "inv_freq" in n)
    assert weight_bytes(shape, setup) == base.bytes_after + base.bytes_other - rotary
    (told,) = about_experts(shape)
    assert told.value == "frozen in NF4, without adapters"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_they_compute_is_the_slow_reference(folder: Path, dtype: torch.dtype) -> None:
    """Token by token and choice by choice in fp64, gradients to tokens and weights included."""
    (module, *_) = mixtures(loaded(folder)).values()
    module.compute_dtype = dtype
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 64, generator=generator).requires_grad_()
    # Most go to one expert, some experts get none, and a token may meet one twice.
    chosen = torch.randint(0, 3, (150, 2), generator=generator) * 2 % 5
    chosen[:100, 0] = 4
    weights = torch.rand(150, 2, generator=generator).requires_grad_()
    upstream = torch.randn(150, 64, generator=generator)
    out = module(x, chosen, weights)
    found = (out, *torch.autograd.grad(out, (x, weights), upstream))
    assert out.dtype == x.dtype

    wide = x.detach().double().requires_grad_()
    shares = weights.detach().double().requires_grad_()
    lines = []
    for t in range(150):
        total = torch.zeros(64, dtype=torch.float64)
        for choice in range(2):
            number = int(chosen[t, choice])
            up = module.matrices[UP][number].dequantize(torch.float32).double()
            down = module.matrices[DOWN][number].dequantize(torch.float32).double()
            gate, other = (up @ wide[t]).chunk(2)
            total = total + shares[t, choice] * (down @ (torch.nn.functional.silu(gate) * other))
        lines.append(total)
    expected = torch.stack(lines)
    wanted = (expected, *torch.autograd.grad(expected, (wide, shares), upstream.double()))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


def test_the_loss_before_quantization_is_that_of_the_original_experts(folder: Path) -> None:
    source = open_model(ModelRecipe(name=str(folder)))
    model = load(folder, Case(r=4))
    held_out = rows(30, 11)
    found = unquantized_loss(model, held_out, source.read)
    original = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    total, count = 0.0, 0
    for row in held_out:
        ids = torch.from_numpy(row.input_ids).long()
        with torch.no_grad():
            logits = original(input_ids=ids[None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
        count += len(ids) - 1
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    with torch.no_grad():
        quantized = model.loss_sum(make_batch(held_out)).item() / count
    assert quantized != pytest.approx(found.loss, rel=1e-4)


@pytest.mark.parametrize("tokens", [(60, 90, 50), (700, 500)])
def test_what_they_keep_is_estimated_within_a_quarter(
    tokens: tuple[int, ...], folder: Path
) -> None:
    model = load(folder, Case(r=4))
    shape = model_shape(open_model(ModelRecipe(name=str(folder))).config)
    made = Setup("fp32", True, 64, True, 4, "all-linear", "adamw")
    batch = make_batch([TokenizedRow(r.input_ids % 200, r.loss_mask, r.row) for r in rows(*tokens)])
    for checkpointing in (False, True):
        model.use_gradient_checkpointing(checkpointing)
        counted = saved_bytes(model, batch)
        estimate = kept_bytes(shape, made, tokens=batch.num_tokens, checkpointing=checkpointing)
        assert 0.8 < estimate / counted < 1.25
        peak = activation_bytes(shape, made, tokens=batch.num_tokens, checkpointing=checkpointing)
        assert (peak > estimate) == checkpointing


def test_bitsandbytes_leaves_them_in_16_bits(folder: Path, tmp_path: Path) -> None:
    where = bitsandbytes_folder(folder, tmp_path, bnb_4bit_use_double_quant=True)
    base = loaded(where)
    theirs = load_file(where / "model.safetensors")
    for name, module in mixtures(base).items():
        for matrix in module.all_matrices:
            assert isinstance(matrix, DenseWeight)
        gate = theirs[f"{name}.3.gate_proj.weight"].float()
        assert torch.equal(module.weight(UP, 3)[:64], gate)
    source = open_model(ModelRecipe(name=str(where)))
    shape = model_shape(source.config, "m", source.stored_nf4)
    setup = Setup("fp32", True, 64, True, 4, "all-linear", "adamw")
    rotary = sum(b.nbytes for n, b in base.model.named_buffers() if "inv_freq" in n)
    assert weight_bytes(shape, setup) == base.bytes_after + base.bytes_other - rotary
    (told,) = about_experts(shape)
    assert told.value == "frozen in 16 bits, without adapters"


def test_a_whole_run(folder: Path, tiny_rows: Path, tmp_path: Path) -> None:
    """Trained, measured before quantization too, saved, read again and asked."""
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(folder)},
            "data": {"path": str(tiny_rows), "held_out": 4},
            "lora": {"r": 4},
            "training": {"batch_size": 4, "max_steps": 3, "learning_rate": 1e-3},
            "evaluation": {"every_steps": 3, "prompts": 1, "max_new_tokens": 4},
        }
    )
    run = train(recipe, out=tmp_path / "run", runs=tmp_path)
    events = [record.event for record in read_events(run.folder)]
    (told,) = [e for e in events if isinstance(e, Choice) and e.key == "experts"]
    assert "the router is left as it is" in told.reason
    assert {e.what for e in events if isinstance(e, Evaluated)} >= {"base", "quantized base"}
    (model,) = [e for e in events if isinstance(e, ModelLoaded)]
    assert model.lora_modules == {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2}
    assert all(e.passed for e in events if isinstance(e, Checked))
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), run.adapter, is_trainable=False
    )
    assert len([n for n, _ in peft.named_parameters() if ".lora_" in n]) == 2 * 2 * 4


LIST = '["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]'


@pytest.mark.parametrize(
    ("setting", "target"),
    [
        (f"target_modules: {LIST}", "gate_proj"),  # what recipes for dense models name
        ("target_modules: [q_proj, gate_up_proj]", "gate_up_proj"),
        ("target_modules: [q_proj, experts]", "experts"),
        ("target_modules: [q_proj, gate]", "gate"),
        ("target_modules: [mlp.experts.5.down_proj]", "mlp.experts.5.down_proj"),
        (r"target_modules: '.*\.mlp\.experts\..*'", r".*\.mlp\.experts\..*"),
        ("exclude_modules: [experts]", "experts"),
    ],
)
def test_adapters_on_experts_are_refused_with_the_reason(
    setting: str, target: str, folder: Path, tiny_rows: Path
) -> None:
    text = f"model: {{name: {folder}}}\ndata: {{path: {tiny_rows}}}\nlora:\n  {setting}\n"
    with pytest.raises(ModelError) as caught:
        rehearse(parse_recipe(text, "r.yaml"))
    key = setting.partition(":")[0]
    assert str(caught.value) == (
        f"lora.{key} is or holds {target!r}, which fits only this model's experts or router, and "
        "those get no adapters; leave it out, or name layers that every token passes (q_proj, "
        "k_proj, v_proj, o_proj)."
    )


def test_what_fits_experts_and_layers_alike_is_told() -> None:
    config = OTHERS["deepseek v3"]().config  # which has shared experts and dense layers
    shape = model_shape(config)
    told = experts_warning(LoraRecipe(target_modules=["o_proj", "down_proj"]), shape)
    assert told is not None
    assert "lora.target_modules: 'down_proj' also fits this model's experts" in told
    told = experts_warning(LoraRecipe(target_modules=r".*\.mlp\..*"), shape)
    assert told is not None
    for target in ("all-linear", ["o_proj"], r".*\.shared_experts\..*"):
        assert experts_warning(LoraRecipe(target_modules=target), shape) is None
        refuse_experts(LoraRecipe(target_modules=target), shape)
    dense = model_shape(LlamaConfig(**SHAPE))
    refuse_experts(LoraRecipe(target_modules=["experts"]), dense)  # which fits nothing, as is told


def test_which_tokens_an_expert_gets_is_read_by_the_host(folder: Path) -> None:
    """So that a step is not captured as a CUDA graph, which a run tells."""
    (module, *_) = mixtures(loaded(folder)).values()
    chosen = torch.tensor([[0, 3], [2, 3], [5, 1]])
    with torch.no_grad(), HostReads() as reads:
        module(torch.randn(3, 64), chosen, torch.full((3, 2), 0.5))
    assert reads.found


def logits_of(model: QLoRAModel, ids: np.ndarray) -> Tensor:
    with torch.no_grad():
        return model.logits(make_batch([TokenizedRow(ids, np.zeros(len(ids), bool), 0)]))


OTHERS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2)),
    "deepseek v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SHAPE | {"num_key_value_heads": 4},
            moe_intermediate_size=64,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=32,
            kv_lora_rank=16,
            qk_rope_head_dim=16,
            qk_nope_head_dim=16,
            v_head_dim=32,
        )
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_mixtures_of_the_same_form_load(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    """Shared experts, dense layers among them, other names in the checkpoint: as transformers."""
    save_family(OTHERS[kind], tiny_model, tmp_path)
    base = loaded(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    model = QLoRAModel(base.model, {}, torch.float32)
    for name, layer in model.linears.items():
        reference.get_submodule(name).weight.data = layer.weight_dense()
    for name, module in mixtures(base).items():
        for which, matrices in module.matrices.items():
            for number in range(len(matrices)):
                whole = reference.get_submodule(name).get_parameter(which).data
                whole[number] = module.weight(which, number)
    ids = rows(40)[0].input_ids
    with torch.no_grad():
        wanted = reference(input_ids=torch.from_numpy(ids).long()[None]).logits[0]
    assert (logits_of(model, ids) - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_experts_of_another_form_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """GPT-OSS has biases, and stores its matrices the other way round."""
    config = GptOssConfig(**SHAPE, head_dim=16, num_local_experts=4, num_experts_per_tok=2)
    save_family(lambda: GptOssForCausalLM(config), tiny_model, tmp_path)
    with pytest.raises(ModelError, match="nor experts of the usual kind") as error:
        loaded(tmp_path)
    assert ". " not in str(error.value)


@pytest.mark.parametrize("part", ["3.up_proj", "5.down_proj", "3"])
def test_a_missing_expert_is_told(part: str, folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    there = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in there.items() if f"layers.1.mlp.experts.{part}." not in n}
    assert len(kept) < len(there)
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lack expert|do not fit"):
        loaded(tmp_path)
