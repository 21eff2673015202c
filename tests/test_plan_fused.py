"""What is planned for fused layers against what they take, counted tensor by tensor."""

from __future__ import annotations

import weakref
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
)

from halfbyte.data.batch import Batch, TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.kernels import attention_efficient
from halfbyte.kernels.choice import PLAIN, Kernels
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.fused import FEW_LOGIT_BYTES, LOGIT_BYTES, FusedNetwork
from halfbyte.model.lora import attach_lora
from halfbyte.model.skeleton import quantized_linears
from halfbyte.optim.flat import flatten_parameters
from halfbyte.plan.device import Device
from halfbyte.plan.memory import Setup
from halfbyte.plan.memory_attention import Room
from halfbyte.plan.memory_fused import FusedMemory
from halfbyte.plan.parameters import model_shape
from halfbyte.plan.resolve import Resolved, resolve
from halfbyte.plan.speed import device_speed, step_seconds
from halfbyte.plan.strategy import Budget, PassSize, Way, choose_way, ways
from halfbyte.quant.joined import FlatAdapter
from halfbyte.quant.linear import QLoRALinear
from halfbyte.quant.nf4 import quantize_nf4
from halfbyte.recipe.load import parse_recipe
from halfbyte.run.techniques import techniques

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=40)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES | {"hidden_size": 160, "head_dim": 20})),
}
TARGETS: dict[str, str | tuple[str, ...]] = {
    "all": "all-linear",
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "some": ("v_proj", "up_proj", "down_proj"),
    "down": ("down_proj",),
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
H100 = Device("cuda", "NVIDIA H100", 85_000_000_000, 84_000_000_000, (9, 0), True, 16)


def fused(family: str, made: Setup, kernels: Kernels = PLAIN) -> FusedNetwork:
    """A network with random weights and its adapters, copies of all weights kept."""
    found = fused_model(family, made, kernels).fused
    assert found is not None
    return found


def fused_model(family: str, made: Setup, kernels: Kernels = PLAIN) -> QLoRAModel:
    model_class, config = FAMILIES[family]
    torch.manual_seed(0)
    compute = TYPES[made.precision]
    network = model_class(config).to(torch.float32 if made.upcast_rest else compute)
    for name, linear in quantized_linears(network).items():
        weight = quantize_nf4(linear.weight.detach(), block_size=made.block_size, double_quant=True)
        bias = None if linear.bias is None else linear.bias.detach().to(compute)
        out, columns = linear.weight.shape
        layer = QLoRALinear.from_weight(weight, bias, columns, out, compute)
        network.set_submodule(name, layer)
    targets = made.target_modules
    lora = attach_lora(
        network,
        r=made.r,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        seed=1,
    )
    model = QLoRAModel(network, lora, compute)
    found = FusedNetwork(network, model.head, compute, kernels)
    flat = flatten_parameters(model.lora_parameters())
    at = dict(zip(flat.names, flat.offsets, strict=True))
    offsets = {layer: (at[f"{n}.lora_A"], at[f"{n}.lora_B"]) for n, layer in lora.items()}
    found.keep_copies()
    found.attach(FlatAdapter(flat.data, flat.grad, flat.data.to(compute, copy=True), offsets))
    model.fused = found
    return model


def setup(precision: str, upcast: bool, targets: str, r: int = 8) -> Setup:
    return Setup(precision, upcast, 32, True, r, TARGETS[targets], "adamw_8bit", fused=True)


def batch_of(*lengths: int) -> Batch:
    rows = [TokenizedRow(np.arange(n) % 500, np.ones(n, bool), n) for n in lengths]
    return make_batch(rows)


@pytest.mark.parametrize(
    ("family", "targets", "precision", "upcast"),
    [
        ("llama", "all", "fp32", True),
        ("llama", "attention", "bf16", True),
        ("llama", "some", "bf16", False),
        ("mistral", "attention", "fp32", True),
        ("mistral", "down", "bf16", True),
        ("qwen2", "all", "bf16", True),
        ("qwen2", "some", "fp32", True),
        ("qwen2", "down", "bf16", False),
    ],
)
def test_what_layers_keep_is_known_to_the_byte(
    family: str, targets: str, precision: str, upcast: bool
) -> None:
    made = setup(precision, upcast, targets)
    network, batch = fused(family, made), batch_of(17, 30, 5)
    planned = FusedMemory(model_shape(FAMILIES[family][1]), made)
    for recomputed in (0, 1, 4):
        network.recompute_layers(recomputed)
        tokens = len(batch.input_ids)
        assert network.kept_bytes(batch) == tokens * planned.kept_per_token(recomputed)


@pytest.mark.parametrize("recomputed", [0, 1, 4])
def test_what_layers_keep_is_known_where_attention_pads_rows(recomputed: int) -> None:
    made = replace(setup("bf16", True, "attention"), pads_rows=True)
    kernels = replace(hollow(), attention_lse_shape=attention_efficient.lse_shape)
    network = fused("llama", made, kernels)
    network.recompute_layers(recomputed)
    planned = FusedMemory(model_shape(FAMILIES["llama"][1]), made)
    batch = batch_of(170, 17, 30, 5)
    kept = planned.kept(222, recomputed, Room(4, 170))
    assert network.kept_bytes(batch) == kept
    # Of rows of one length, a multiple of what their sums are rounded to, it is as elsewhere.
    assert planned.kept(128, recomputed, Room(2, 64)) == 128 * planned.kept_per_token(recomputed)


def test_the_peak_where_attention_pads_rows_is_known() -> None:
    """Rows of 300 and 4 tokens, of whose 9 · 300 positions each has sums as wide as a head."""
    heads, size = SIZES["num_attention_heads"], SIZES["head_dim"]

    def backward(d_out: Any, qkv: Any, *_: Any, **__: Any) -> None:
        gradients = [torch.empty_like(d_out) for _ in range(3)]
        copies = [torch.empty_like(d_out) for _ in range(2)]
        sums = [torch.empty(3, 128, 64) for _ in range(9) for _ in range(heads)]
        del gradients, copies, sums

    made = replace(setup("bf16", True, "attention"), pads_rows=True)
    shape = model_shape(FAMILIES["llama"][1])
    kernels = replace(
        hollow(), attention_lse_shape=attention_efficient.lse_shape, attention_backward=backward
    )
    network, batch = fused("llama", made, kernels), batch_of(300, *[4] * 8)
    planned, room = FusedMemory(shape, made), Room(9, 300)
    network.prepare(512)
    for recomputed in range(5):
        network.recompute_layers(recomputed)
        with Alive() as alive:
            network.loss_and_gradients(batch, torch.ones(()), None)
        assert alive.most > 4 * heads * 9 * 300 * size
        labels = len(batch.label_ids)
        peak = planned.peak(len(batch.input_ids), labels, recomputed, room)
        assert 0.999 * alive.most <= peak <= 1.05 * alive.most
        assert planned.peak(len(batch.input_ids), labels, recomputed) < 0.6 * alive.most


@pytest.mark.parametrize("recomputed", [0, 3, 4])
def test_the_report_says_what_the_layers_of_the_run_keep(recomputed: int) -> None:
    made = setup("fp32", True, "attention")
    model, batch = fused_model("llama", made), batch_of(17, 30, 5)
    assert model.fused is not None
    model.fused.recompute_layers(recomputed)
    recipe = parse_recipe("model: {name: m}\ndata: {path: d}\nprecision: fp32\n", "r.yaml")
    told = techniques(recipe, model, [], [], batch, 0)[0]
    planned = FusedMemory(model_shape(FAMILIES["llama"][1]), made)
    whole, now, least = (52 * planned.kept_per_token(n) for n in (0, recomputed, 4))
    assert told.figures == {
        "tokens": 52.0,
        "bytes kept without": whole,
        "bytes kept with": least,
        "bytes saved": whole - now,
    }
    assert told.on is (recomputed > 0)
    begins = {
        0: "Off: ",
        3: "3 of 4 layers were computed again",
        4: "Each layer was computed again",
    }
    assert told.text.startswith(begins[recomputed])
    assert model.fused.recomputed_layers == recomputed


@pytest.mark.parametrize("targets", ["all", "some"])
def test_copies_and_scratch_are_known_to_the_byte(targets: str) -> None:
    made = setup("bf16", True, targets)
    planned = FusedMemory(model_shape(FAMILIES["llama"][1]), made)
    network = fused("llama", made)
    whole = planned.step(64, 64, recomputed=0, copied=4)
    for joined in network.joined:
        joined.kept = None
    assert network.keep_copies(3) == planned.step(64, 64, recomputed=0, copied=3).copy
    assert 4 * network.use_scratch() == whole.copy
    assert [joined.kept is None for joined in network.joined] == [False] * 12 + [True] * 4


class Alive(TorchDispatchMode):
    """The most bytes that were alive at once of tensors made while it lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if torch.is_tensor(t)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in before:
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self.now += size
        self.most = max(self.most, self.now)

        def gone(_: Any) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)


def hollow() -> Kernels:
    """Kernels that do nothing, and take the memory that those for a GPU take."""

    def head_loss(
        hidden: Any, weight: Any, labels: Any, *_: Any, chunk_bytes: int, **__: Any
    ) -> Any:
        rows = min(len(hidden), chunk_bytes // (len(weight) * hidden.element_size()))
        logits = hidden.new_empty(rows, len(weight))
        return hidden.new_empty(len(labels), dtype=torch.float32).sum() + 0 * len(logits)

    nothing = {field.name: lambda *_, **__: None for field in fields(Kernels)}
    lse = PLAIN.attention_lse_shape
    return Kernels(**nothing | {"attention_lse_shape": lse, "head_loss": head_loss})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("targets", "upcast"), [("attention", True), ("all", True), ("all", False)]
)
def test_the_peak_of_a_step_is_known(targets: str, upcast: bool) -> None:
    made = setup("bf16", upcast, targets)
    network, batch = fused("llama", made, hollow()), batch_of(40, 60)
    planned = FusedMemory(model_shape(FAMILIES["llama"][1]), made)
    network.prepare(512)
    for recomputed in range(5):
        network.recompute_layers(recomputed)
        with Alive() as alive:
            network.loss_and_gradients(batch, torch.ones(()), None)
        assert alive.now < 100  # the loss; or the rest would not have been counted rightly
        peak = planned.peak(len(batch.input_ids), len(batch.label_ids), recomputed)
        assert 0.999 * alive.most <= peak <= 1.05 * alive.most


def tinyllama(**changed: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    return LlamaConfig(**sizes | changed)


TINYLLAMA = model_shape(tinyllama())
RECIPE = Setup("bf16", True, 64, True, 16, TARGETS["attention"], "adamw_8bit", fused=True)


@pytest.mark.parametrize(
    ("recomputed", "copied", "measured_gib"),
    [(22, 0, 1.160), (0, 22, 3.80)],
    ids=["as little as possible", "as fast as possible"],
)
def test_the_recipe_takes_what_was_measured_on_an_h100(
    recomputed: int, copied: int, measured_gib: float
) -> None:
    """PyTorch's peak of allocated memory over whole runs, whose largest bucket had 960 tokens."""
    total = (
        FusedMemory(TINYLLAMA, RECIPE).step(960, 960, recomputed=recomputed, copied=copied).total
    )
    assert 1.0 <= total / 2**30 / measured_gib <= 1.1


def test_the_recipe_takes_the_time_that_was_measured_on_an_h100() -> None:
    for recomputed, copied, measured in ((22, 0, 13.4e-3), (0, 22, 8.45e-3)):
        seconds = step_seconds(
            TINYLLAMA,
            RECIPE,
            device_speed(H100, "bf16"),
            tokens=742,
            row_tokens=186,
            passes=1,
            recomputed=recomputed,
            copied=copied,
        )
        assert seconds == pytest.approx(measured, rel=0.1)


def test_embedding_and_head_count_as_they_are_stored() -> None:
    narrow = FusedMemory(TINYLLAMA, RECIPE).weights
    wide = FusedMemory(replace(TINYLLAMA, stored="fp32"), RECIPE).weights
    # In fp32 there is one more copy of the head, in the products' type.
    assert wide - narrow == 2 * TINYLLAMA.ends + 2 * TINYLLAMA.head
    assert FusedMemory(replace(TINYLLAMA, stored=None), RECIPE).weights == wide


def test_which_networks_are_fused_is_known_from_their_configuration() -> None:
    for _, config in FAMILIES.values():
        assert model_shape(config).not_fused is None
    assert "Qwen3DecoderLayer" in str(model_shape(Qwen3Config(**SIZES)).not_fused)
    assert "relu" in str(model_shape(LlamaConfig(**SIZES, hidden_act="relu")).not_fused)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "dynamic" in str(model_shape(LlamaConfig(**SIZES, rope_parameters=dynamic)).not_fused)


def found_ways(limit: int, checkpointing: tuple[bool, ...] = (False, True)) -> list[Way]:
    size = PassSize(960, 960, 512)
    return ways(
        TINYLLAMA,
        RECIPE,
        H100,
        Budget(limit, "so much"),
        largest=lambda *_: size,
        batches=[(4, 1)],
        checkpointing=checkpointing,
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1_000_000_000, 5_000_000_000))
def test_memory_is_used_up_to_the_last_layer(limit: int) -> None:
    """Against trying all numbers of recomputed and copied layers."""
    memory, speed = FusedMemory(TINYLLAMA, RECIPE), device_speed(H100, "bf16")
    adapter = TINYLLAMA.trainable(16, TARGETS["attention"])
    fastest: float | None = None
    for recomputed in range(23):
        for copied in range(23):
            if memory.step(960, 960, recomputed=recomputed, copied=copied).total <= limit:
                seconds = step_seconds(
                    TINYLLAMA,
                    RECIPE,
                    speed,
                    tokens=960,
                    row_tokens=512,
                    passes=1,
                    recomputed=recomputed,
                    copied=copied,
                    adapter=adapter,
                )
                fastest = seconds if fastest is None else min(fastest, seconds)
    way, fits = choose_way(found_ways(limit), Budget(limit, "so much"))
    assert fits == (fastest is not None)
    if fastest is None:
        assert (way.recomputed_layers, way.copied_layers) == (22, 0)
    else:
        assert way.memory.total <= limit
        assert way.seconds == pytest.approx(fastest)


def test_more_memory_makes_no_step_slower() -> None:
    chosen = [
        choose_way(found_ways(limit), Budget(limit, "so much"))[0]
        for limit in range(1_300_000_000, 4_400_000_000, 50_000_000)
    ]
    seconds = [way.seconds for way in chosen]
    assert seconds == sorted(seconds, reverse=True)
    assert any(0 < way.recomputed_layers < 22 for way in chosen)
    assert any(0 < way.copied_layers < 22 for way in chosen)
    assert (chosen[-1].recomputed_layers, chosen[-1].copied_layers) == (0, 22)


def resolved(text: str, limit_gb: float, rows: list[TokenizedRow] | None = None) -> Resolved:
    text = (
        f"model: {{name: m}}\ndata: {{path: d}}\nmemory_limit_gb: {limit_gb}\nprecision: bf16\n"
        f"lora: {{target_modules: [q_proj, k_proj, v_proj, o_proj]}}\n{text}"
    )
    return resolve(
        parse_recipe(text, "r.yaml"),
        device=H100,
        model_config=tinyllama(),
        rows=500,
        max_length=512,
        held_out=0,
        train=rows or (),
    )


def test_a_recipe_that_recomputes_does_so_in_all_layers_and_copies_what_fits() -> None:
    found = resolved("training: {batch_size: 4, gradient_checkpointing: true}\n", 2.4)
    assert found.recomputed_layers == 22
    assert 0 < found.copied_layers < 22
    (choice,) = [c for c in found.choices if c.key == "copies"]
    assert choice.value == f"{found.copied_layers} of 22 layers"
    assert "the 2.4 GB that the recipe allows" in choice.reason
    kept = resolved("training: {batch_size: 4, gradient_checkpointing: false}\n", 4.5)
    assert kept.recomputed_layers == 0
    free = resolved("training: {batch_size: 4}\n", 2.4)
    assert 0 < free.recomputed_layers < 22
    assert free.recipe.training.gradient_checkpointing is True
    (choice,) = [c for c in free.choices if c.key == "training.gradient_checkpointing"]
    assert choice.reason.startswith(f"{free.recomputed_layers} of 22 layers are recomputed")


def test_too_little_memory_is_told_in_the_recipes_words() -> None:
    found = resolved("training: {batch_size: 4, gradient_checkpointing: true}\n", 0.5)
    (warning,) = found.warnings
    assert "(the 0.5 GB that the recipe allows, " in warning
    assert "--set training.batch_size=1" in warning


def test_memory_is_planned_for_the_largest_batch_that_the_rows_make() -> None:
    long, short = np.arange(512), np.arange(100)
    rows = [
        TokenizedRow(ids, np.ones(len(ids), bool), number)
        for number, ids in enumerate([long] + [short] * 499)
    ]
    text = "training: {batch_size: 4, gradient_accumulation: 1, gradient_checkpointing: true}\n"
    known, unknown = resolved(text, 0.5, rows), resolved(text, 0.5)
    # One long row and three short ones are 812 tokens, rounded up to a bucket's 832.
    assert "a pass of 832 tokens, the largest of 4 rows, needs" in known.warnings[0]
    assert "a pass of 2,048 tokens" in unknown.warnings[0]


def test_logits_in_memory_are_as_many_as_the_fused_network_takes() -> None:
    shape = replace(TINYLLAMA, vocab=10**6)
    for recomputed, at_once in ((22, FEW_LOGIT_BYTES), (21, LOGIT_BYTES)):
        many = FusedMemory(shape, RECIPE).step(8192, 8192, recomputed=recomputed, copied=0)
        assert many.loss - 2 * 2048 * 8192 - 8 * 8192 == at_once
