"""The model and the rows of all cases, made once, and the size of a CUDA context.

    python -m peers.prepare model DATA TOKENIZER_MODEL WORK ROWS:BATCH:STEPS ...
    python -m peers.prepare context

The rows are halfbyte's own, in the order in which it trains on them, so that the peers, which go
through theirs in sequence, have the same rows in every batch. One JSON line is printed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "tinyllama-chatdoctor.yaml"

# TinyLlama-1.1B's, by the names of transformers' LlamaConfig.
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}


def make_model(folder: Path, tokenizer_model: Path, shape: dict[str, Any]) -> None:
    """A random Llama in bf16 with Llama's tokenizer; ``folder`` appears when it is whole."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(ROOT / "tests"))
    from llama_tokenizer import llama_tokenizer

    config = LlamaConfig(
        **shape,
        initializer_range=0.02,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    part = folder.with_name(f"{folder.name}.part{os.getpid()}")
    model.save_pretrained(part)
    llama_tokenizer(tokenizer_model).save_pretrained(part)
    part.rename(folder)


def make_rows(data: Path, model: Path, rows: int, batch: int, steps: int) -> dict[str, Any]:
    """The rows of ``steps`` steps and more, in whole epochs, in halfbyte's order.

    ``texts`` are what a peer tokenizes, ``ids`` what must come out of it; ``tokens`` and
    ``labels`` are by the step. Raises where the tokenizer gives a peer other tokens.
    """
    from halfbyte.data.batching import Batches
    from halfbyte.data.prepare import prepare
    from halfbyte.data.split import read_split
    from halfbyte.model.source import context_length, open_model
    from halfbyte.recipe import Recipe

    recipe = Recipe.load(RECIPE, overrides(data, model, rows, batch))
    source = open_model(recipe.model)
    prepared = prepare(recipe, source.tokenizer, context_length(source.config))
    if len(prepared.train) != rows:
        raise SystemExit(f"{data} gives {len(prepared.train)} rows to train, and not {rows}")
    read = read_split(recipe.data)
    by_number = {example.row: example for example in read.rows}
    batches = Batches(prepared.train, batch, 1, recipe.seed)
    texts, ids, tokens, labels = [], [], [], []
    for number in range(1, -(-steps // batches.steps_per_epoch) * batches.steps_per_epoch + 1):
        epoch, at = divmod(number - 1, batches.steps_per_epoch)
        step = [prepared.train[i] for i in batches.epoch(epoch)[0][at * batch : (at + 1) * batch]]
        for row in step:
            segments = prepared.template.segments(by_number[row.row], "all")
            text = "".join(segment.text for segment in segments)
            if source.tokenizer(text)["input_ids"][: prepared.max_length] != list(row.input_ids):
                raise SystemExit(f"row {row.row}: its text gives a peer other tokens")
            texts.append(text)
            ids.append(row.input_ids.tolist())
        tokens.append(sum(len(row) for row in step))
        labels.append(sum(row.num_labels for row in step))
    return {
        "max_length": prepared.max_length,
        "texts": texts,
        "ids": ids,
        "tokens": tokens,
        "labels": labels,
    }


def overrides(data: Path, model: Path, rows: int, batch: int) -> list[str]:
    """What every case changes in the recipe.

    Nothing is held out: the peers measure nothing on such rows either.
    """
    return [
        f"model.name={model}",
        f"data.path={data}",
        f"data.limit={rows}",
        "data.held_out=0",
        f"training.batch_size={batch}",
        "quantization.double_quant=true",
        "evaluation.prompts=0",
        "evaluation.base_loss=false",
    ]


def measure_context() -> dict[str, Any]:
    """Make a CUDA context and stay long enough to be sampled."""
    import torch

    kept = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    time.sleep(1.0)
    del kept
    properties = torch.cuda.get_device_properties(0)
    return {
        "reserved_bytes": torch.cuda.memory_reserved(),
        "gpu": properties.name,
        "gpu_uuid": str(getattr(properties, "uuid", "")),
        "torch": torch.__version__,
    }


def main(words: list[str]) -> None:
    if words[0] == "context":
        print(json.dumps(measure_context()))
        return
    data, tokenizer_model, work = (Path(word) for word in words[1:4])
    model = work / "model"
    if not model.exists():
        make_model(model, tokenizer_model, SHAPE)
    for word in words[4:]:
        rows, batch, steps = (int(part) for part in word.split(":"))
        path = work / f"rows-{rows}-by-{batch}.json"
        if path.exists() and len(json.loads(path.read_text(encoding="utf-8"))["tokens"]) >= steps:
            continue
        made = make_rows(data, model, rows, batch, steps)
        path.write_text(json.dumps(made), encoding="utf-8")
    print(json.dumps({"model": "made"}))


if __name__ == "__main__":
    main(sys.argv[1:])
