"""The fixed work of ``halfbyte bench``: a model, a tokenizer and rows, made on the spot.

The weights are random, so that nothing is downloaded; what a step costs does not depend on them.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.recipe import Recipe

SEED = 42


@dataclass(frozen=True)
class Workload:
    """A Llama's shape (by the names of its configuration) and rows of so many tokens.

    The lengths of rows are spread evenly over ``shortest`` to ``longest``. ``warmup`` steps come
    before the ``steps`` that are timed.
    """

    name: str
    shape: dict[str, Any]
    rows: int
    shortest: int
    longest: int
    batch_size: int
    warmup: int
    steps: int


# TinyLlama-1.1B's shape, with rows about as long as ChatDoctor's.
ON_GPU = Workload(
    "llama-1.1b",
    {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    rows=500,
    shortest=80,
    longest=290,
    batch_size=4,
    warmup=5,
    steps=100,
)
# A few seconds on two cores.
ON_CPU = Workload(
    "llama-2m",
    {
        "vocab_size": 2048,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
    rows=60,
    shortest=80,
    longest=160,
    batch_size=4,
    warmup=2,
    steps=10,
)


def make_workload(folder: Path, workload: Workload, device: str) -> Recipe:
    """Write the model and the rows of ``workload`` into ``folder``; returns what trains on them."""
    _make_model(folder / "model", workload, device)
    letters = random.Random(SEED)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(workload.rows):
            span = workload.longest - workload.shortest
            length = workload.shortest + span * number // max(1, workload.rows - 1)
            # One token a byte, two line breaks and the end-of-sequence token among them.
            text = "".join(letters.choices("abcdefghijklmnopqrstuvwxyz    ", k=length - 3))
            half = length // 2
            row = {"instruction": f"q{text[1:half]}", "output": f"a{text[half + 1 :]}"}
            file.write(json.dumps(row) + "\n")
    return Recipe.model_validate(
        {
            "seed": SEED,
            "device": device,
            "model": {"name": str(folder / "model")},
            "data": {
                "path": str(folder / "rows.jsonl"),
                "template": "{instruction}\n\n{output}",
                "loss_on": "all",
                "held_out": 0,
                "max_length": 512,
            },
            "quantization": {"double_quant": True},
            "lora": {
                "r": 16,
                "lora_alpha": 32,
                "lora_dropout": 0.05,
                "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            },
            "training": {
                "learning_rate": 2e-4,
                "warmup_steps": 0,
                "batch_size": workload.batch_size,
                "gradient_accumulation": 1,
                "max_steps": workload.warmup + workload.steps,
            },
            "evaluation": {"prompts": 0, "base_loss": False},
        }
    )


def _make_model(folder: Path, workload: Workload, device: str) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0} | {letter: 1 + at for at, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        **workload.shape,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
