"""Fused layers against transformers' own through autograd, which other tests compare with PEFT.

Here the kernels are PyTorch's own operations in fp32, so that rounding hides nothing; the kernels
themselves have tests of their own, and a GPU runs both together in test_gpu_training.py.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")

from halfbyte.data.batch import Batch, TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.kernels.choice import PLAIN, Kernels
from halfbyte.kernels.dropout import dropout_keys_reference
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.fused import FusedNetwork, NotFusedError
from halfbyte.model.load import load_base
from halfbyte.model.source import open_model
from halfbyte.recipe.schema import ModelRecipe, QuantizationRecipe
from oracle.case import Case, Family, random_adapter, save_model
from oracle.fused import fuse
from oracle.fused_mutants import FUSED_MUTANTS
from oracle.ours import load

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
STEP, MICRO_BATCH, SEED = 7, 1, 13


@dataclass(frozen=True)
class Fusing:
    """How a network is fused."""

    family: Family
    targets: str | tuple[str, ...] = "all-linear"
    double: bool = False
    keep: int | None = None
    recompute: int = 0
    p: float = 0.1
    batch: Literal["as it is", "padded", "every position"] = "padded"


CASES = {
    "kept": Fusing("llama", QKVO),
    "from NF4": Fusing("llama", double=True, keep=0, recompute=3),
    "biases": Fusing("qwen2", double=True, batch="every position"),
    "some kept, some made again": Fusing("qwen2", keep=2, recompute=1),
    "biases, some": Fusing("qwen2", ("q_proj", "v_proj", "down_proj"), keep=0, p=0.0),
    "window, all made again": Fusing("mistral", recompute=3, p=0.3, batch="as it is"),
    "window, some": Fusing("mistral", ("k_proj", "up_proj"), double=True, keep=0),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    families: list[Family] = ["llama", "qwen2", "mistral", "qwen3", "gemma3"]
    found = {family: tmp_path_factory.mktemp(family) for family in families}
    for family, folder in found.items():
        layers = {} if family == "gemma3" else {"num_hidden_layers": 3}
        save_model(folder, family, **layers)
    yield found
    torch.set_num_threads(threads)


def make_rows() -> list[TokenizedRow]:
    random = np.random.default_rng(0)
    return [
        TokenizedRow(random.integers(3, 300, n).astype(np.int32), random.random(n) < 0.6, i)
        for i, n in enumerate((17, 1, 30, 9))
    ]


def batch_of(kind: str) -> Batch:
    rows = make_rows()
    if kind == "as it is":
        return make_batch(rows)
    return make_batch(rows, 5, tokens=96, labels=64 if kind == "padded" else 96, max_seqlen=32)


@dataclass
class Pass:
    """What a forward and backward pass and an evaluation give."""

    loss: Tensor
    evaluated: Tensor
    gradients: dict[str, Tensor]


def adapter(model: QLoRAModel, turn: int) -> dict[str, Tensor]:
    """A and B, neither zero, and others for another ``turn``."""
    found = random_adapter({n: p.shape for n, p in model.lora_parameters().items()})
    return {n: t.roll(turn, 0) * (1.0 + turn) for n, t in found.items()}


@torch.no_grad()
def put(model: QLoRAModel, values: dict[str, Tensor]) -> None:
    for name, parameter in model.lora_parameters().items():
        parameter.copy_(values[name])
    model.adapter_changed()


def run(model: QLoRAModel, batch: Batch) -> Pass:
    position = model.position
    assert position is not None
    position.step, position.micro_batch = STEP, MICRO_BATCH
    if position.keys is not None:
        dropout_keys_reference(SEED, torch.tensor([STEP, MICRO_BATCH]), position.keys)
    parameters = model.lora_parameters()
    for parameter in parameters.values():
        if parameter.grad is not None:
            parameter.grad.zero_()
    model.network.train()
    loss = model.loss_and_gradients(batch, torch.tensor(0.37))
    gradients = {n: p.grad.clone() for n, p in parameters.items()}
    model.network.eval()
    with torch.no_grad():
        evaluated = model.loss_sum(batch)
    return Pass(loss, evaluated, gradients)


def both(
    folders: dict[str, Path], how: Fusing, kernels: Kernels = PLAIN
) -> tuple[Pass, Pass, QLoRAModel]:
    """The pass through transformers' layers, the one through fused layers, and the fused model.

    The fused layers have made a pass before with another adapter, and an update since.
    """
    targets = how.targets if isinstance(how.targets, str) else list(how.targets)
    model = load(
        folders[how.family],
        Case(double_quant=how.double, r=4, lora_alpha=8),
        dropout=how.p,
        seed=SEED,
        targets=targets,
    )
    batch = batch_of(how.batch)
    put(model, adapter(model, 1))
    expected = run(model, batch)
    put(model, adapter(model, 0))
    fuse(model, kernels, keep=how.keep, recompute=how.recompute)
    before = run(model, batch)
    # A backward pass leaves in scratch memory what the next forward pass begins with.
    model.loss_and_gradients(batch, torch.ones(()))
    put(model, adapter(model, 1))
    found = run(model, batch)
    assert not torch.equal(before.loss, found.loss)
    return expected, found, model


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """‖found - expected‖ / ‖expected‖ of each matrix.

    An error e means a cosine similarity of at least √(1 - e²) and a norm ratio within 1 ± e.
    """
    assert found.keys() == expected.keys()
    assert all(torch.count_nonzero(g) > 0 for g in expected.values())
    return {n: ((found[n] - g).norm() / g.norm()).item() for n, g in expected.items()}


@pytest.mark.parametrize("name", CASES)
def test_fused_layers_are_transformers_layers(folders: dict[str, Path], name: str) -> None:
    expected, found, model = both(folders, CASES[name])
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.evaluated, expected.evaluated, rtol=1e-6, atol=0)
    wrong = errors(found.gradients, expected.gradients)
    print(f"{name}: {max(wrong.values()):.1e}")
    assert max(wrong.values()) < 1e-5, wrong
    # A second micro-batch adds to what the first one left.
    model.network.train()
    model.loss_and_gradients(batch_of(CASES[name].batch), torch.tensor(0.37))
    for n, parameter in model.lora_parameters().items():
        torch.testing.assert_close(parameter.grad, 2 * found.gradients[n])


@pytest.mark.parametrize("keep", [None, 1, 0], ids=["kept", "one kept", "from NF4"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_recomputing_and_keeping_weights_change_no_bit(
    folders: dict[str, Path], family: Family, keep: int | None
) -> None:
    how = Fusing(family, keep=keep)
    first = both(folders, Fusing(family))[1]
    for recompute in (0, 2):
        found = both(folders, replace(how, recompute=recompute))[1]
        assert torch.equal(found.loss, first.loss)
        assert torch.equal(found.evaluated, first.evaluated)
        for name, gradient in first.gradients.items():
            assert torch.equal(found.gradients[name], gradient), name


# Where a mutant shows, if not with a kept weight and dropout on a llama.
SHOWS: dict[str, Fusing] = {
    "scratch_weight_has_the_old_b": Fusing("llama", keep=0),
    "scratch_of_another_layer": Fusing("llama", keep=0),
    "bias_forgotten": Fusing("qwen2"),
    "window_forgotten": Fusing("mistral"),
}


@pytest.mark.parametrize("mutant", FUSED_MUTANTS)
def test_a_mutant_shows(
    folders: dict[str, Path], mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = SHOWS.get(mutant, Fusing("llama"))
    kernels = FUSED_MUTANTS[mutant](monkeypatch, PLAIN)
    expected, found, _ = both(folders, how, kernels)
    wrong = errors(found.gradients, expected.gradients)
    print(f"{mutant}: {max(wrong.values()):.3f} in {sum(e > 1e-5 for e in wrong.values())}")
    assert max(wrong.values()) > 1e-2


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_kept_weight_is_the_one_made_on_the_fly(
    folders: dict[str, Path], double: bool, dtype: torch.dtype
) -> None:
    """Bit for bit, with B folded in, and the base in it as it was before it was joined."""
    weights = []
    for keep in (None, 0):
        model = load(folders["qwen2"], Case(double_quant=double, r=4, lora_alpha=8), dtype=dtype)
        base = [layer.base.dequantize(dtype) for layer in model.linears.values()]
        put(model, adapter(model, 0))
        fuse(model, PLAIN, keep=keep, recompute=0)
        assert model.fused is not None
        put(model, adapter(model, 1))
        after = [layer.base.dequantize(dtype) for layer in model.linears.values()]
        assert all(torch.equal(a, b) for a, b in zip(base, after, strict=True))
        dense = [layer.weight_dense() for layer in model.linears.values()]
        assert all(torch.equal(a, b) for a, b in zip(base, dense, strict=True))
        values, scale = adapter(model, 1), next(iter(model.lora.values())).scale
        for joined in model.fused.joined:
            weight = joined.weight()
            expected = torch.cat([layer.base.dequantize(dtype) for layer in joined.layers])
            assert torch.equal(weight[:, : joined.columns], expected)
            folded = torch.zeros(joined.rows, joined.extra, dtype=dtype)
            row = column = 0
            for layer in joined.layers:
                name = next(n for n, found in model.lora.items() if found is layer)
                b = values[f"{name}.lora_B"] * scale
                folded[row : row + len(b), column : column + 4] = b.to(dtype)
                row, column = row + len(b), column + 4
            assert torch.equal(weight[:, joined.columns :], folded)
            weights.append(weight.clone())
    kept, made = weights[: len(weights) // 2], weights[len(weights) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(kept, made, strict=True))


def test_longer_rows_leave_a_captured_pass_its_rotations(folders: dict[str, Path]) -> None:
    """A graph reads them where they were when it was captured; an evaluation comes after it."""
    model = load(folders["llama"], Case(r=4))
    fuse(model, PLAIN)
    assert model.fused is not None
    model.fused.prepare(32)
    there = weakref.ref(model.fused.cos), weakref.ref(model.fused.sin)
    model.fused.prepare(64)
    gc.collect()
    cos, sin = (table() for table in there)
    assert cos is not None
    assert sin is not None
    assert torch.equal(cos, model.fused.cos[:32])
    assert torch.equal(sin, model.fused.sin[:32])


def test_joining_stores_nothing_twice(folders: dict[str, Path]) -> None:
    model = load(folders["llama"], Case(double_quant=False, r=4))
    fuse(model, PLAIN, keep=0, recompute=0)
    assert model.fused is not None
    for layer in model.fused.layers:
        q, k, v = layer.qkv.layers
        assert (
            q.base.codes.untyped_storage().data_ptr() == k.base.codes.untyped_storage().data_ptr()
        )
        assert v.base.codes.data_ptr() == k.base.codes.data_ptr() + k.base.codes.numel()
        assert v.base.absmax.data_ptr() == k.base.absmax.data_ptr() + 4 * k.base.absmax.numel()


NOT_FUSED: list[tuple[Family, dict[str, Any], str]] = [
    ("qwen3", {}, "its layers are Qwen3DecoderLayer"),
    ("gemma3", {}, "its layers are Gemma3DecoderLayer"),
    ("llama", {"hidden_act": "relu"}, "its activation is relu"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        r"its rotary embedding \(dynamic\) depends on the length",
    ),
]


@pytest.mark.parametrize(("family", "changed", "reason"), NOT_FUSED, ids=[c[2] for c in NOT_FUSED])
def test_another_family_is_not_fused(
    tmp_path: Path, family: Family, changed: dict[str, Any], reason: str
) -> None:
    save_model(tmp_path, family, **changed)
    model = load(tmp_path, Case(r=4))
    with pytest.raises(NotFusedError, match=reason):
        FusedNetwork(model.network, model.head, torch.float32, PLAIN)


def test_adapters_or_blocks_that_do_not_fit_are_not_fused(folders: dict[str, Path]) -> None:
    model = load(folders["llama"], Case(r=4))
    layer = next(iter(model.lora.values()))
    layer.lora_A = torch.nn.Parameter(torch.zeros(8, layer.in_features))
    with pytest.raises(NotFusedError, match=r"different ranks \(lora\.rank_pattern\)"):
        FusedNetwork(model.network, model.head, torch.float32, PLAIN)
    model = load(folders["llama"], Case(r=4))
    next(iter(model.lora.values())).scale = 3.0
    with pytest.raises(NotFusedError, match=r"different factors \(lora\.alpha_pattern\)"):
        FusedNetwork(model.network, model.head, torch.float32, PLAIN)
    loaded = load_base(
        open_model(ModelRecipe(name=str(folders["llama"]))),
        quantization=QuantizationRecipe(block_size=128),
        device="cpu",
        compute_dtype=torch.float32,
        rest_dtype=torch.float32,
    )
    model = QLoRAModel(loaded.model, {}, torch.float32)
    with pytest.raises(NotFusedError, match="no whole number of blocks"):
        FusedNetwork(model.network, model.head, torch.float32, PLAIN)
