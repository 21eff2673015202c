"""Peak resident memory while a model is loaded into 4 bits.

    python benchmarks/load_memory.py [--layers 16 --hidden 1024 …] [--write]

Makes a Llama-shaped model with random bf16 weights in a temporary folder and loads it in child
processes: with halfbyte (single safetensors file and shards, rest in 16 and in 32 bits, GGUF) and
with transformers + bitsandbytes. What is measured is how far the process's resident memory rises
above what it held just before the load (libraries imported, tokenizer and configuration read):
the kernel's high-water mark, reset before. halfbyte has to stay under

    4-bit weights + what is kept in 16 or 32 bits + the largest tensor in 16 bits + 300 MB.

Prints a table; ``--write`` writes results/load_memory.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from peak_memory import finish, measure, reset_peak, status

ALLOWANCE = 300_000_000  # bytes
CASES = {
    "one file, rest in 16 bits": ("halfbyte", "one", "bf16"),
    "one file, rest in 32 bits": ("halfbyte", "one", "fp32"),
    "shards, rest in 16 bits": ("halfbyte", "shards", "bf16"),
    "GGUF (F16), rest in 16 bits": ("halfbyte", "gguf", "bf16"),
    "one file": ("transformers + bitsandbytes", "one", "bf16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1152)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--write", action="store_true", help="also write results/load_memory.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        tool, folder, rest = args.child
        print(json.dumps(load(tool, Path(folder), rest)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = make_folders(Path(scratch), args.layers, args.hidden, args.vocabulary)
        for case, (tool, folder, rest) in CASES.items():
            rows += measure(case, tool, __file__, [tool, str(folders[folder]), rest])
    finish("load_memory", rows, write=args.write)


def make_folders(scratch: Path, layers: int, hidden: int, vocabulary: int) -> dict[str, Path]:
    """The same random weights as one safetensors file, as shards and as GGUF."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    state = {
        name: torch.empty(t.shape, dtype=torch.bfloat16).normal_(std=0.02)
        for name, t in model.state_dict().items()
    }
    words = {"<s>": 0, "</s>": 1, "a": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(words, [])), bos_token="<s>", eos_token="</s>"
    )
    folders = {name: scratch / name for name in ("one", "shards", "gguf")}
    model = model.to_empty(device="cpu")
    model.load_state_dict(state, assign=True)
    for name, size in (("one", "100GB"), ("shards", "200MB")):
        model.save_pretrained(folders[name], max_shard_size=size)
        tokenizer.save_pretrained(folders[name])
    folders["gguf"].mkdir()
    write_gguf(folders["gguf"] / "model.gguf", config, state)
    return folders


def write_gguf(path: Path, config: Any, state: dict[str, Any]) -> None:
    import gguf
    import torch

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(64)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab"])
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in state.items():
        dtype = torch.float16 if tensor.dim() == 2 else torch.float32
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.to(dtype).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(tool: str, folder: Path, rest: str) -> dict[str, tuple[float, str]]:
    """Load in this process; metric: (value, unit)."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[rest]
    return load_halfbyte(folder, dtype) if tool == "halfbyte" else load_transformers(folder)


def load_halfbyte(folder: Path, rest_dtype: Any) -> dict[str, tuple[float, str]]:
    import torch

    from halfbyte.model.load import load_base
    from halfbyte.model.source import open_model
    from halfbyte.recipe.schema import ModelRecipe, QuantizationRecipe

    source = open_model(ModelRecipe(name=str(folder)))
    source.names()
    before = reset_peak()
    base = load_base(
        source,
        quantization=QuantizationRecipe(),
        device="cpu",
        compute_dtype=torch.bfloat16,
        rest_dtype=rest_dtype,
    )
    peak = status("VmHWM")
    largest = 2 * max(source.read(name).numel() for name in source.names())
    bound = base.bytes_after + base.bytes_other + largest + ALLOWANCE
    return {
        "parameters": (base.parameters, ""),
        "4-bit weights": (base.bytes_after, "bytes"),
        "kept as they are": (base.bytes_other, "bytes"),
        "largest tensor in 16 bits": (largest, "bytes"),
        "bound": (bound, "bytes"),
        "peak above start": (peak - before, "bytes"),
        "share of bound": ((peak - before) / bound, ""),
        "whole process at peak": (peak, "bytes"),
    }


def load_transformers(folder: Path) -> dict[str, tuple[float, str]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from transformers.models.llama import modeling_llama  # noqa: F401

    AutoTokenizer.from_pretrained(folder)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    before = reset_peak()
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    peak = status("VmHWM")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    return {
        "peak above start": (peak - before, "bytes"),
        "whole process at peak": (peak, "bytes"),
    }


if __name__ == "__main__":
    main()
