"""Tokens over a cache of fixed size, captured and not, against networks that keep no cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, Llama4TextConfig, LlamaConfig

from generation_case import FAMILIES, NEW, PROMPTS, build, oracle, ours
from halfbyte import Recipe, train
from halfbyte.events import read_events
from halfbyte.events.types import Answered, Fallback
from halfbyte.generate import decoding
from halfbyte.generate.cached_attention import ready_to_generate
from halfbyte.generate.captured import StaticStep, contents
from halfbyte.model.attention import use_varlen_attention
from oracle.case import Case
from oracle.ours import load


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Lets the CPU take the path of a GPU; holds the tokens that steps have been asked for."""
    asked: list[Tensor] = []
    call = StaticStep.__call__

    def noted(step: StaticStep, tokens: Tensor) -> Tensor:
        asked.append(tokens)
        return call(step, tokens)

    monkeypatch.setattr(decoding, "worth_capturing", lambda *_: True)
    monkeypatch.setattr(StaticStep, "__call__", noted)
    return asked


def prefilled(model: Any, total: int) -> tuple[StaticStep, Tensor]:
    """A step after PROMPTS, padded on the left, and the tokens [rows] that come next."""
    device, longest = model.device, max(map(len, PROMPTS))
    padding = torch.tensor([longest - len(p) for p in PROMPTS], device=device)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS], device=device)
    cache = DynamicCache(config=model.config)
    positions = (torch.arange(longest, device=device) - padding[:, None]).clamp_min(0)
    seen = torch.arange(longest, device=device) >= padding[:, None]
    with torch.no_grad():
        logits = model(
            input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache
        ).logits[:, -1]
    return StaticStep(model, contents(cache), padding, longest, total), logits.argmax(-1)


def without_a_cache(model: Any, rows: list[list[int]]) -> Tensor:
    """The last logits of each row alone, computed from its first token on."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    last = [
        model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0, -1]
        for row in rows
    ]
    model.set_attn_implementation(implementation)
    return torch.stack(last)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_whole_rows(family: str) -> None:
    model = build(family)
    with ready_to_generate(model):
        step, tokens = prefilled(model, 19 + 30)
        rows = [list(prompt) for prompt in PROMPTS]
        for _ in range(30):
            for row, token in zip(rows, tokens.tolist(), strict=True):
                row.append(token)
            found = step(tokens)
            torch.testing.assert_close(found, without_a_cache(model, rows), rtol=1e-4, atol=1e-4)
            tokens = found.argmax(-1)
    assert len(set(rows[1][3:])) > 8, "one token again and again shows little"


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_transformers(family: str, always: list[Tensor]) -> None:
    model = build(family)
    use_varlen_attention(model)
    reasons: list[str] = []
    assert ours(model, PROMPTS, on_fallback=reasons.append) == oracle(model, PROMPTS)
    assert ours(model, PROMPTS[:1], on_fallback=reasons.append) == oracle(model, PROMPTS[:1])
    assert reasons == []
    assert len(always) == 2 * (NEW - 1)


def test_what_is_drawn_is_the_same_too(
    always: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("qwen3")
    setting = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2}
    found = ours(model, PROMPTS, ends=frozenset(range(20)), **setting)
    assert len(always) > 5
    monkeypatch.setattr(decoding, "worth_capturing", lambda *_: False)
    assert ours(model, PROMPTS, ends=frozenset(range(20)), **setting) == found
    assert len({len(row) for row in found}) > 1, "no row ended before another"


class ToTheHost(TorchDispatchMode):
    """Counts the reads of a number from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_token_leaves_the_host_alone(family: str) -> None:
    model = build(family)
    with ready_to_generate(model):
        step, tokens = prefilled(model, 40)
        with ToTheHost() as reads:
            step(tokens)
            assert reads.count == 0
            bool(tokens.any())
            assert reads.count == 1
        assert step.host_reads() == []


def dynamic_rope() -> Any:
    """A model that looks at the positions to choose its frequencies."""
    config: LlamaConfig = FAMILIES["llama"]()
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_network_that_asks_the_host_is_left_as_it_is(always: list[Tensor]) -> None:
    model = dynamic_rope()
    reasons: list[str] = []
    assert ours(model, PROMPTS, on_fallback=reasons.append) == oracle(model, PROMPTS)
    (reason,) = reasons
    assert reason.startswith("LlamaForCausalLM makes the host wait for the device")
    assert always == []


def test_chunks_are_left_as_they_are(always: list[Tensor]) -> None:
    shape = {**FAMILIES["llama"]().to_dict(), "num_local_experts": 1, "attention_chunk_size": 16}
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    names += ("num_local_experts", "attention_chunk_size", "initializer_range")
    config = Llama4TextConfig(**{name: shape[name] for name in names})
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config).eval()
    reasons: list[str] = []
    found = ours(model, PROMPTS, on_fallback=reasons.append)
    assert (len(reasons), always) == (1, [])
    assert reasons[0].startswith("Llama4ForCausalLM keeps or sees something else")
    assert [len(row) for row in found] == [NEW] * len(PROMPTS)


def test_a_step_that_says_something_else_is_not_used(
    always: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    monkeypatch.setattr(StaticStep, "_mask", lambda _, seen: torch.ones_like(seen))
    reasons: list[str] = []
    assert ours(model, PROMPTS, on_fallback=reasons.append) == oracle(model, PROMPTS)
    assert reasons == ["LlamaForCausalLM says something else with a cache of fixed size"]
    assert len(always) == 1


@pytest.mark.parametrize("captured", [True, False])
def test_a_run_says_why_its_answers_are_not_captured(
    captured: bool,
    always: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
    tiny_rows: Path,
    tmp_path: Path,
) -> None:
    if not captured:
        monkeypatch.setattr(StaticStep, "_mask", lambda _, seen: torch.ones_like(seen))
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(tiny_model)},
            "data": {"path": str(tiny_rows), "held_out": 4},
            "training": {"max_steps": 1},
            "evaluation": {"prompts": 2, "max_new_tokens": 16, "base_loss": False},
        }
    )
    run = train(recipe, out=tmp_path / "run", runs=tmp_path)
    events = [record.event for record in read_events(run.folder)]
    said = [event for event in events if isinstance(event, Fallback) and "answers" in event.what]
    assert len([event for event in events if isinstance(event, Answered)]) == 4
    assert always
    if captured:
        assert said == []
    else:
        assert [event.reason for event in said] == [
            "LlamaForCausalLM says something else with a cache of fixed size"
        ]


def test_graphs_are_for_many_tokens_on_a_gpu() -> None:
    assert not decoding.worth_capturing(torch.device("cpu"), 1000)
    assert not decoding.worth_capturing(torch.device("cuda"), 4)
    assert decoding.worth_capturing(torch.device("cuda"), 96)


def quantized(
    folder: Path, *, kept: bool, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Any:
    """The tiny model with 4-bit layers and an adapter that says something."""
    qlora = load(folder, Case(double_quant=True), dropout=0.1, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(2)
    for layer in qlora.lora.values():
        assert layer.lora_B is not None
        new = torch.randn(layer.lora_B.shape, generator=generator) * 0.3
        layer.lora_B.data.copy_(new)
    if kept:
        for linear in qlora.linears.values():
            linear.keep_dense()
    return qlora


@pytest.mark.parametrize("kept", [True, False])
def test_quantized_layers_say_the_same(
    kept: bool, tiny_model: Path, always: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    qlora = quantized(tiny_model, kept=kept)
    reasons: list[str] = []

    def both() -> list[list[list[int]]]:
        found = []
        for on in (False, True):
            with qlora.adapter_on(on):
                found.append(ours(qlora.network, PROMPTS, on_fallback=reasons.append))
        return found

    found = both()
    assert (len(always), reasons) == (2 * (NEW - 1), [])
    monkeypatch.setattr(decoding, "worth_capturing", lambda *_: False)
    assert both() == found
    assert found[0] != found[1]


@pytest.mark.gpu
@pytest.mark.parametrize("own_stream", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_ids_are_those_of_transformers_on_a_gpu(family: str, own_stream: bool) -> None:
    model = build(family).to("cuda")
    use_varlen_attention(model)
    expected = oracle(model, PROMPTS)
    reasons: list[str] = []
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream() if own_stream else None):
        assert ours(model, PROMPTS, on_fallback=reasons.append) == expected
        assert ours(model, PROMPTS[:1], on_fallback=reasons.append) == oracle(model, PROMPTS[:1])
    assert reasons == []


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_graph_gives_the_bits_of_the_eager_step(
    dtype: torch.dtype, kept: bool, tiny_model: Path
) -> None:
    qlora = quantized(tiny_model, kept=kept, dtype=dtype, device="cuda")
    for on in (False, True):
        with qlora.adapter_on(on), ready_to_generate(qlora.network):
            eager, tokens = prefilled(qlora.network, 19 + NEW)
            graph, _ = prefilled(qlora.network, 19 + NEW)
            graph.ids.copy_(tokens[:, None])
            graph.capture()
            assert graph.graph is not None
            said = set()
            for _ in range(NEW):
                expected = eager(tokens)
                assert torch.equal(graph(tokens), expected)
                tokens = expected.argmax(-1)
                said.update(tokens.tolist())
            assert len(said) > 8
            graph.release()
        reasons: list[str] = []
        with qlora.adapter_on(on):
            first = ours(qlora.network, PROMPTS, on_fallback=reasons.append)
            assert ours(qlora.network, PROMPTS, on_fallback=reasons.append) == first
        assert reasons == []


@pytest.mark.gpu
def test_what_cannot_be_captured_is_answered_on_a_gpu_too() -> None:
    model = dynamic_rope().to("cuda")
    reasons: list[str] = []
    assert ours(model, PROMPTS, on_fallback=reasons.append) == oracle(model, PROMPTS)
    assert len(reasons) == 1


@pytest.mark.gpu
def test_the_memory_of_a_graph_comes_back() -> None:
    model = build("llama").to("cuda")
    ours(model, PROMPTS)
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(3):
        ours(model, PROMPTS)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == allocated
    assert torch.cuda.memory_reserved() == reserved
