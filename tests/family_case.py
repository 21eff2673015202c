"""A tiny model of each family that is trained, with everything on that the family is known for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

WINDOW = 7  # shorter than the rows
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Ten times the usual: at the usual size scores are nearly even and logits nearly the same,
    # whatever is wrong with positions, windows or scales.
    "initializer_range": 0.2,
}


@dataclass(frozen=True)
class FamilyCase:
    """How a tiny model of a family is made, and what becomes of it here."""

    make: Callable[[], PreTrainedModel]
    fused: bool = False  # its layers can be fused
    kernel: bool = True  # a kernel does its attention
    by_length: bool = False  # its positions are turned by the length of the row


def _llama(**changed: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHAPE | changed))


def _phi(**changed: Any) -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**SHAPE | changed))


_ALTERNATING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
FAMILIES: dict[str, FamilyCase] = {
    "llama 2": FamilyCase(_llama, fused=True),
    "llama 3": FamilyCase(
        lambda: _llama(
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            tie_word_embeddings=True,
        ),
        fused=True,
    ),
    "falcon 3": FamilyCase(
        lambda: _llama(
            head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 1000042.0}
        ),
        fused=True,
    ),
    "mistral": FamilyCase(
        lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=WINDOW)), fused=True
    ),
    "qwen 2.5": FamilyCase(
        lambda: Qwen2ForCausalLM(
            Qwen2Config(
                **SHAPE,
                use_sliding_window=True,
                sliding_window=WINDOW,
                max_window_layers=1,
                tie_word_embeddings=True,
            )
        ),
        fused=True,
    ),
    "qwen 3": FamilyCase(
        lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True))
    ),
    "gemma 2": FamilyCase(
        lambda: Gemma2ForCausalLM(
            Gemma2Config(
                **SHAPE,
                **_ALTERNATING,
                head_dim=32,
                query_pre_attn_scalar=24,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
            )
        ),
        kernel=False,
    ),
    "gemma 3": FamilyCase(
        lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(
                **SHAPE,
                **_ALTERNATING,
                head_dim=32,
                query_pre_attn_scalar=24,
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                    "full_attention": {
                        "rope_type": "linear",
                        "rope_theta": 10000.0,
                        "factor": 8.0,
                    },
                },
            )
        )
    ),
    "phi 3": FamilyCase(lambda: _phi(sliding_window=WINDOW)),
    "phi 4 mini": FamilyCase(
        lambda: _phi(
            tie_word_embeddings=True,
            original_max_position_embeddings=16,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 16,
                "short_factor": [1.0, 1.2, 1.3, 1.5, 1.6, 1.8],
                "long_factor": [1.5, 2.0, 4.0, 8.0, 16.0, 32.0],
            },
        ),
        by_length=True,
    ),
    "smollm 3": FamilyCase(
        lambda: SmolLM3ForCausalLM(
            SmolLM3Config(
                **SHAPE,
                no_rope_layers=[1, 0],
                use_sliding_window=True,
                sliding_window=WINDOW,
                tie_word_embeddings=True,
            )
        )
    ),
    "granite": FamilyCase(
        lambda: GraniteForCausalLM(
            GraniteConfig(
                **SHAPE,
                attention_multiplier=0.1,
                embedding_multiplier=3.0,
                residual_multiplier=0.5,
                logits_scaling=4.0,
                attention_bias=True,
                mlp_bias=True,
                tie_word_embeddings=True,
            )
        )
    ),
    "qwen 3 moe": FamilyCase(
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **SHAPE,
                head_dim=32,
                moe_intermediate_size=64,
                num_experts=6,
                num_experts_per_tok=2,
                norm_topk_prob=True,
            )
        )
    ),
    "olmo 2": FamilyCase(lambda: Olmo2ForCausalLM(Olmo2Config(**SHAPE))),
}


def save_family(make: Callable[[], PreTrainedModel], tokenizer: Path, folder: Path) -> Path:
    """Random fp32 weights in ``folder``, with the tokenizer of the folder ``tokenizer``."""
    state = torch.random.get_rng_state()
    torch.manual_seed(11)
    model = make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Not the ones or zeros that every norm starts with, nor the zeros of every bias.
            if name.endswith(("norm.weight", ".bias")) or parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    torch.random.set_rng_state(state)
    model.save_pretrained(folder)
    for path in tokenizer.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def bitsandbytes_folder(original: Path, folder: Path, **settings: Any) -> Path:
    """What ``save_pretrained`` makes of a model that transformers has loaded in 4 bits."""
    wanted = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} | settings
    model = AutoModelForCausalLM.from_pretrained(
        original, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**wanted)
    )
    model.save_pretrained(folder)
    for path in original.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
