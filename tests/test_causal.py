"""A model is taken only if it computes what transformers computes, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.errors import ModelError
from halfbyte.model import attention
from halfbyte.model.causal import QLoRAModel, _near
from halfbyte.model.lora import attach_lora
from halfbyte.quant.linear import QLoRALinear
from halfbyte.quant.nf4 import quantize_nf4

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}


def granite() -> PreTrainedModel:
    config = GraniteConfig(**GROUPED, logits_scaling=8.0, attention_multiplier=0.1)
    return GraniteForCausalLM(config)


def gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=16, sliding_window=8))


def mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=8))


def neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL))


@pytest.mark.parametrize("make", [granite, gemma2, mistral, neox])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_family_of_the_usual_kind(
    make: Callable[[], PreTrainedModel], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    QLoRAModel(make().to(dtype), {}, dtype)


def test_recomputing_drops_what_the_model_itself_has_dropped() -> None:
    """GPT-NeoX may have dropout of its own, whose masks come out of a generator."""
    torch.manual_seed(0)
    network = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, hidden_dropout=0.3)).requires_grad_(False)
    head = network.get_output_embeddings()
    for name, linear in list(network.named_modules()):
        if isinstance(linear, nn.Linear) and linear is not head:
            layer = QLoRALinear.from_weight(
                quantize_nf4(linear.weight),
                linear.bias.data,
                linear.in_features,
                linear.out_features,
                torch.float32,
            )
            network.set_submodule(name, layer)
    lora = attach_lora(
        network, r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", seed=1
    )
    for layer in lora.values():
        assert layer.lora_B is not None
        layer.lora_B.data.normal_(std=0.1)
    model = QLoRAModel(network, lora, torch.float32)
    batch = make_batch([TokenizedRow(np.arange(3, 40, dtype=np.int32), np.ones(37, bool), 0)])
    found = []
    for recompute in (False, True):
        model.use_gradient_checkpointing(recompute)
        network.train()
        torch.manual_seed(7)
        network.zero_grad()
        model.loss_and_gradients(batch, torch.tensor(1.0))
        found.append([p.grad for p in model.lora_parameters().values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_attention_of_its_own_is_refused() -> None:
    """Bloom has its own attention, which knows no borders."""
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4))
    with pytest.raises(ModelError, match="BloomForCausalLM attends"):
        QLoRAModel(model, {}, torch.float32)


def test_a_few_positions_may_round_far_off_in_16_bits_and_not_most() -> None:
    """As SmolLM2's do in bf16, whose first tokens have activations of thousands."""
    torch.manual_seed(0)
    theirs = torch.randn(44, 128)
    ours = theirs + 0.01 * torch.randn(44, 128)
    ours[[5, 6, 12]] += torch.randn(3, 128)
    assert _near(ours, theirs, torch.bfloat16)
    assert not _near(ours, theirs, torch.float32)
    ours[25:38] += 0.1 * torch.randn(13, 128)  # more than half of the second row
    assert not _near(ours, theirs, torch.bfloat16)
    for row in (slice(0, 24), slice(24, 44)):
        ours = theirs.clone()
        ours[row] = torch.nan
        assert not _near(ours, theirs, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mistake", ["across", "window", "scaling"])
def test_a_wrong_attention_is_seen(
    mistake: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attention.varlen_attention

    def wrong(*args: Any, row_borders: list[int], **kwargs: Any) -> Any:
        if mistake == "across":
            row_borders = [row_borders[0], row_borders[-1]]
        else:
            kwargs["sliding_window" if mistake == "window" else "scaling"] = None
        return right(*args, row_borders=row_borders, **kwargs)

    monkeypatch.setattr(attention, "varlen_attention", wrong)
    torch.manual_seed(0)
    model = (granite() if mistake == "scaling" else mistral()).to(dtype)
    with pytest.raises(ModelError, match="attends"):
        QLoRAModel(model, {}, dtype)
