"""What both stacks are given: a tiny model's folder, rows, an adapter and settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Family = Literal["llama", "qwen2", "mistral", "qwen3", "gemma3"]

# hidden and intermediate size are multiples of 64: bitsandbytes' CPU code takes no other.
_SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Ten times the usual: a random head of the usual size gives nearly the same logits whatever
    # the hidden state is, and attention that is nearly uniform whatever the positions are.
    "initializer_range": 0.2,
}


@dataclass(frozen=True)
class Case:
    """One training run, to be made twice."""

    family: Family = "llama"
    loss_on: Literal["all", "answer"] = "all"
    batch_size: int = 4
    gradient_accumulation: int = 1
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    double_quant: bool = True
    steps: int = 30
    r: int = 32
    lora_alpha: int = 64
    learning_rate: float = 1e-2
    max_grad_norm: float = 1.0

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation


def make_rows() -> list[tuple[str, str]]:
    """24 rows as (prompt, answer), of 35 to 95 tokens: few words, so there is much to learn."""
    colours = ["red", "blue", "green", "white"]
    things = ["stone", "river", "house"]
    rows = []
    for number in range(24):
        colour, thing = colours[number % 4], things[number % 3]
        told = f" The {thing} is {colour}." * (number * 7 % 5)
        prompt = (
            f"### Instruction:\nName the colour of the {thing}.\n\n"
            f"### Input:\nLook at it.{told}\n\n### output:\n"
        )
        rows.append((prompt, f"It is {colour}" + f", so {colour}" * (number * 5 % 7) + "."))
    return rows


def save_model(folder: Path, family: Family, **changed: Any) -> None:
    """Random fp32 weights and a byte-level tokenizer that adds a beginning-of-sequence token.

    ``changed`` are settings of the configuration other than those of all cases.
    """
    random_state = torch.random.get_rng_state()
    torch.manual_seed(11)
    shape = _SHAPE | changed
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
    elif family == "mistral":
        # A window shorter than the rows, in every layer.
        model = MistralForCausalLM(MistralConfig(**{"sliding_window": 16} | shape))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True))
    else:
        # A window shorter than the rows, in the first layer of the two.
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(
                **shape,
                sliding_window=16,
                layer_types=["sliding_attention", "full_attention"],
                query_pre_attn_scalar=16,
            )
        )
    for name, parameter in model.named_parameters():
        # Not the ones that every norm starts with, nor the zeros of every bias.
        if name.endswith(("norm.weight", ".bias")):
            parameter.data += 0.2 * torch.randn_like(parameter)
    torch.random.set_rng_state(random_state)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_SHAPE["vocab_size"],
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([prompt + answer for prompt, answer in make_rows()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def random_adapter(shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """A and B at random, neither zero: with B = 0 every first gradient of A would be zero."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(shape, generator=generator)
        * (shape[1] ** -0.5 if name.endswith("lora_A") else 0.02)
        for name, shape in shapes.items()
    }


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """PEFT's adapter matrices under halfbyte's names."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


@dataclass
class Trace:
    """What a run leaves for the comparison.

    ``gradients`` of step 1, before clipping, by adapter matrix (``….q_proj.lora_A``); ``losses``
    the mean over the labelled tokens of each step; ``tokens`` and ``labels`` of each row, labels
    unshifted, -100 where nothing is learned.
    """

    gradients: dict[str, Tensor]
    losses: list[float]
    tokens: list[list[int]]
    labels: list[list[int]]
