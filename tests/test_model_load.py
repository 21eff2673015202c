"""Loading a safetensors folder into 4 bits, compared with bitsandbytes and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.load import load_base
from halfbyte.model.source import ModelSource, open_model
from halfbyte.quant.linear import QLoRALinear
from halfbyte.recipe.schema import ModelRecipe, QuantizationRecipe

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"}, tie_word_embeddings=True)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=False)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SHAPE, sliding_window=8, query_pre_attn_scalar=16)
    ),
    "phi3": lambda: Phi3ForCausalLM(
        Phi3Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"}, tie_word_embeddings=False)
    ),
}


def make_folder(family: str, tiny_model: Path, folder: Path, dtype: torch.dtype) -> Path:
    """A random model of ``family`` with the tokenizer of ``tiny_model``."""
    torch.manual_seed(3)
    model = (
        LlamaForCausalLM.from_pretrained(tiny_model) if family == "llama" else FAMILIES[family]()
    )
    for parameter in model.parameters():  # biases and norms start at 0 and 1: let them count
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB")
    for path in tiny_model.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_bytes((tiny_model / "chat_template.jinja").read_bytes())
    return folder


@pytest.fixture(scope="module", params=["llama", *FAMILIES])
def folder(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    where = tmp_path_factory.mktemp("families") / request.param
    return make_folder(request.param, tiny_model, where, torch.bfloat16)


def opened(folder: Path) -> ModelSource:
    return open_model(ModelRecipe(name=str(folder)))


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_codes_scales_and_logits(folder: Path, double: bool) -> None:
    """Each tensor as bitsandbytes stores it; logits of transformers with dequantized weights."""
    functional = pytest.importorskip("bitsandbytes.functional")
    source = opened(folder)
    loaded = load_base(
        source,
        quantization=QuantizationRecipe(double_quant=double),
        device="cpu",
        compute_dtype=torch.float32,
        rest_dtype=torch.float32,
    )
    reference = AutoModelForCausalLM.from_pretrained(folder)
    assert reference.dtype == torch.bfloat16
    tied = reference.lm_head.weight is reference.get_input_embeddings().weight
    assert loaded.parameters == sum(p.numel() for p in reference.parameters())
    assert (loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight) == tied

    linears = {n: m for n, m in loaded.model.named_modules() if isinstance(m, QLoRALinear)}
    originals = {
        n: m
        for n, m in reference.named_modules()
        if isinstance(m, torch.nn.Linear) and n != "lm_head"
    }
    assert list(linears) == list(originals)
    assert loaded.quantized_modules == len(originals)
    after = 0
    for name, original in originals.items():
        nf4 = linears[name].base
        assert torch.equal(source.read(f"{name}.weight"), original.weight)
        codes, state = functional.quantize_4bit(
            original.weight.data, blocksize=64, compress_statistics=double, quant_type="nf4"
        )
        assert torch.equal(nf4.codes, codes.view(-1)), name
        assert torch.equal(nf4.absmax, state.absmax), name
        if double:
            assert torch.equal(nf4.nested, state.state2.absmax), name
            assert torch.equal(nf4.offset, state.offset), name
        after += nf4.nbytes
        state.dtype = torch.float32
        original.weight = torch.nn.Parameter(functional.dequantize_4bit(codes, state))
    for name, layer in linears.items():
        # What is joined later lies side by side now, so that joining copies nothing.
        following = linears.get(
            name.replace("q_proj", "k_proj").replace("gate_proj", "up_proj"), layer
        )
        if following is not layer:
            assert following.base.codes.data_ptr() == layer.base.codes.data_ptr() + (
                layer.base.codes.nbytes
            )
    assert loaded.bytes_after == after
    assert loaded.bytes_before == sum(2 * m.weight.numel() for m in originals.values())

    ids = torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference.float()(input_ids=ids).logits[0]
    model = QLoRAModel(loaded.model, {}, torch.float32)
    batch = make_batch([TokenizedRow(ids[0].numpy(), np.zeros(24, dtype=bool), 0)])
    with torch.no_grad():
        got = model.logits(batch)
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()
