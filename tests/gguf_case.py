"""Tiny models of the families that GGUF knows, each with an adapter that PEFT has made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "<|im_start|>user\nSay the number 12345 in words, it's <b>one</b>!<|im_end|>\n",
    "naïve café,  東京 🦙\n\n\n don't;\tx_1=3.14e-10   end ",
    "plain",
]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPLIT = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = ("Say the number in words. The number is one. It is one and two, that is all. " * 3, "one")


@dataclass(frozen=True)
class Case:
    """A model's folder, an adapter's in PEFT's format, and what PEFT makes of the two."""

    family: str
    model: Path
    adapter: Path
    tokenizer: Any
    ids: list[Tensor]  # [1, T]
    logits: list[Tensor]  # [T, vocabulary], fp32


def make_case(folder: Path, family: str, **lora: Any) -> Case:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model, adapter = folder / "model", folder / "adapter"
    tokenizer = _sentencepiece() if family == "mistral" else _byte_level(family)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    state = torch.random.get_rng_state()
    torch.manual_seed(11)
    network = AutoModelForCausalLM.from_config(_config(family, len(tokenizer), tokenizer))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1 or "bias" in name:
                parameter.normal_(std=0.08)
            else:
                parameter.uniform_(0.5, 1.5)
    network.save_pretrained(model)
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"],
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"down_proj": 3},
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
    }
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(**settings | lora)
    )
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(std=0.15)
    peft.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    torch.random.set_rng_state(state)
    ids = [torch.tensor([tokenizer(text).input_ids]) for text in TEXTS]
    with torch.no_grad():
        logits = [peft.eval()(input_ids=row).logits[0] for row in ids]
    return Case(family, model, adapter, tokenizer, ids, logits)


def _config(family: str, rows: int, tokenizer: Any) -> Any:
    from transformers import AutoConfig

    settings: dict[str, Any] = {
        "vocab_size": rows + 3,  # as many models have more rows than tokens
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": family in ("qwen2", "mistral"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    }
    if family == "llama":
        settings["attention_bias"] = True
        settings["max_position_embeddings"] = 16384
        settings["rope_parameters"] = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    if family == "qwen3":
        settings["head_dim"] = 128  # the only one that transformers reads from GGUF
    return AutoConfig.for_model(family, **settings)


def _byte_level(family: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(ignore_merges=family == "llama"))
    split = _SPLIT.replace("{DIGITS}", "{1,3}" if family == "llama" else "")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*_WORDS, "123 45 it's don't"] * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def _sentencepiece() -> Any:
    """Characters merged, bytes to fall back on, a space before a text: as Llama 2's."""
    from transformers import AddedToken, LlamaTokenizer

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    letters = [*sorted(set("".join(_WORDS)) - {" "}), "▁"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("o", "n"), ("on", "e"), ("▁", "▁"), ("s", ".")]
    merges += [("▁", "one"), ("i", "n"), ("▁", "in")]
    for token in [*letters, *(left + right for left, right in merges)]:
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    ends = [AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens(ends, special_tokens=True)
    tokenizer.add_tokens([AddedToken("<tag>", normalized=False)])
    return tokenizer
