"""Small random models of several families, and their tokens by transformers and by halfbyte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from halfbyte.generate.cached_attention import ready_to_generate
from halfbyte.generate.decoding import decode
from halfbyte.generate.sampling import Sampling

NEW = 48
_SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,  # wide, or a random model says one token for ever
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,  # Gemma's tied ones would answer each token with itself
}
# A window shorter than the prompts, in some layers and not in others.
_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=8),
    "gemma3": lambda: Gemma3TextConfig(
        **_SHAPE, sliding_window=8, layer_types=_LAYERS, query_pre_attn_scalar=8
    ),
    "gemma2": lambda: Gemma2Config(
        **_SHAPE,
        sliding_window=8,
        layer_types=_LAYERS,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
    ),
}


def build(family: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(FAMILIES[family]())
        for name, parameter in model.named_parameters():
            if "norm" in name:  # Gemma's start at 0, others' at 1: neither shows a mistake
                torch.nn.init.uniform_(parameter.data, 0.5, 1.5)
    return model.eval()


def oracle(model: Any, prompts: list[list[int]], ends: list[int] | None = None) -> list[list[int]]:
    """What ``model.generate`` says, greedily, the prompts padded on the left."""
    implementation = model.config._attn_implementation
    # sdpa has no capped scores
    capped = getattr(model.config, "attn_logit_softcapping", None)
    model.config._attn_implementation = "eager" if capped else "sdpa"
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts]).to(model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]).to(ids)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=NEW, pad_token_id=0, eos_token_id=ends
    )
    out = model.generate(ids, attention_mask=mask, generation_config=settings)
    model.config._attn_implementation = implementation
    return out[:, longest:].tolist()


def ours(
    model: Any,
    prompts: list[list[int]],
    *,
    ends: frozenset[int] = frozenset(),
    on_fallback: Callable[[str], None] | None = None,
    **sampling: float,
) -> list[list[int]]:
    """What halfbyte says, each row up to its end."""
    rows: list[list[int]] = [[] for _ in prompts]
    with ready_to_generate(model):
        for tokens in decode(
            model,
            prompts,
            limits=[NEW] * len(prompts),
            ends=set(ends),
            sampling=Sampling(**sampling),
            seeds=range(len(prompts)),
            on_fallback=on_fallback,
        ):
            for row, token in zip(rows, tokens, strict=True):
                row += [] if token is None else [token]
    return rows


PROMPTS = [
    list(torch.randint(1, 300, (n,), generator=torch.Generator().manual_seed(n)))
    for n in (19, 3, 11, 1)
]
PROMPTS = [[int(token) for token in prompt] for prompt in PROMPTS]
