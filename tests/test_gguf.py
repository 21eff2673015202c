"""GGUF files, compared with transformers' own loader, which dequantizes all of one first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from halfbyte.errors import ModelError
from halfbyte.model.skeleton import build_skeleton, make_buffers
from halfbyte.model.source import ModelSource, open_model
from halfbyte.recipe.schema import ModelRecipe

TEXTS = [
    "",
    " leading and  double   spaces\n\n\tand\ttabs ",
    "<|im_start|>user\nWhat is 12345 + 678?<|im_end|>\n<|im_start|>assistant\n",
    "naïve café, 東京 🦙, don't; x_1=3.14e-10",
    "<|endoftext|><|im_end|> text after <|im_start|>",
]


def opened(path: Path) -> ModelSource:
    return open_model(ModelRecipe(name=str(path)))


def same_config(source: ModelSource, path: Path) -> None:
    theirs = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    ours = source.config.to_dict()
    for config in (ours, theirs):
        config.pop("_name_or_path", None)
        config.pop("_model_name_or_path", None)
    assert ours == theirs


def same_tensors_and_logits(source: ModelSource, path: Path) -> None:
    """Each tensor bit for bit; and the logits of the model that is put together from them."""
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    state = reference.state_dict()
    tied = {"lm_head.weight"} if source.config.tie_word_embeddings else set()
    assert set(source.names()) == set(state) - tied
    tensors = {name: source.read(name) for name in source.names()}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, state[name]), name

    model = build_skeleton(source.config, source.name)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    make_buffers(model, "cpu")
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)


def test_smollm2_equals_transformers(smollm2_gguf: Path) -> None:
    source = opened(smollm2_gguf)
    assert source.format == "gguf"
    assert source.licence == "apache-2.0"
    same_config(source, smollm2_gguf)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    for text in TEXTS:
        assert source.tokenizer(text).input_ids == tokenizer(text).input_ids
    assert source.chat_template is not None
    assert source.chat_template == tokenizer.chat_template
    assert "<|im_start|>assistant" in source.chat_template
    assert source.tokenizer.eos_token == "<|im_end|>"
    same_tensors_and_logits(source, smollm2_gguf)


HIDDEN, FFN, HEADS, KV_HEADS, LAYERS, VOCABULARY = 256, 512, 4, 2, 2, 300


def write_gguf(path: Path, architecture: str, kinds: list[Kind], extra: dict[str, Any]) -> Path:
    """A random model with tensors in ``kinds`` by turns, and a byte-level vocabulary."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    # transformers reads no head size for Qwen 3, whose models all have this one.
    head = 128 if architecture == "qwen3" else HIDDEN // HEADS
    if architecture == "qwen3":
        writer.add_key_length(head)
    alphabet = list("!abcdefghijklmnopqrstuvwxyz".ljust(27))
    tokens = [*alphabet, "ab", *(f"t{i}" for i in range(VOCABULARY - 30)), "<s>", "</s>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(tokens) - 1)
    random = np.random.default_rng(5)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, HIDDEN)}
    shapes["output_norm.weight"] = (HIDDEN,)
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm.weight": (HIDDEN,),
                "ffn_norm.weight": (HIDDEN,),
                "attn_q.weight": (HEADS * head, HIDDEN),
                "attn_k.weight": (KV_HEADS * head, HIDDEN),
                "attn_v.weight": (KV_HEADS * head, HIDDEN),
                "attn_output.weight": (HIDDEN, HEADS * head),
                "ffn_gate.weight": (FFN, HIDDEN),
                "ffn_up.weight": (FFN, HIDDEN),
                "ffn_down.weight": (HIDDEN, FFN),
                **(
                    {
                        "attn_q.bias": (HEADS * head,),
                        "attn_k.bias": (KV_HEADS * head,),
                        "attn_v.bias": (KV_HEADS * head,),
                    }
                    if architecture == "qwen2"
                    else {}
                ),
                **(
                    {"attn_q_norm.weight": (head,), "attn_k_norm.weight": (head,)}
                    if architecture == "qwen3"
                    else {}
                ),
            }.items()
        }
    if extra.get("untied"):
        shapes["output.weight"] = (VOCABULARY, HIDDEN)
    for number, (name, shape) in enumerate(shapes.items()):
        values = (0.05 * random.standard_normal(shape)).astype(np.float32)
        kind = kinds[number % len(kinds)] if len(shape) == 2 else Kind.F32
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    for name, values in extra.get("tensors", {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "untied"), [("llama", True), ("qwen2", False), ("qwen3", True)]
)
def test_families_and_formats(tmp_path: Path, architecture: str, untied: bool) -> None:
    kinds = [Kind.Q4_0, Kind.Q8_0, Kind.F16, Kind.BF16, Kind.Q5_1, Kind.Q4_1, Kind.Q5_0, Kind.F32]
    path = write_gguf(tmp_path / "model.gguf", architecture, kinds, {"untied": untied})
    source = opened(tmp_path)
    same_config(source, path)
    same_tensors_and_logits(source, path)


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q2_K, Kind.Q3_K])
def test_k_quants_are_dequantized(tmp_path: Path, kind: Kind) -> None:
    """Blocks of random bytes: the package cannot write these formats."""
    from halfbyte.model.gguf_file import GgufFile

    _, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(1).integers(0, 256, (40, 3 * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "qwen2")
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = GgufFile(tmp_path / "k.gguf").read("blk.0.ffn_up.weight").numpy()
    assert np.array_equal(got, gguf.dequantize(blocks, kind), equal_nan=True)


def test_llama3_frequencies(tmp_path: Path) -> None:
    """The divisors that llama.cpp stores are recognized; others are refused."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 50000.0, "factor": 32.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    config = LlamaConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, rope_parameters=rope, num_hidden_layers=1
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    exponents = torch.arange(0, HIDDEN // HEADS, 2).float() / (HIDDEN // HEADS)
    divisors = (50000.0**-exponents / scaled).numpy()
    extra = {"tensors": {"rope_freqs.weight": divisors}}
    path = write_gguf(tmp_path / "model.gguf", "llama", [Kind.F16], extra)
    assert opened(path).config.rope_parameters == rope
    extra = {"tensors": {"rope_freqs.weight": divisors * 1.5}}
    path = write_gguf(tmp_path / "other.gguf", "llama", [Kind.F16], extra)
    with pytest.raises(ModelError, match="rotary"):
        opened(path)


def test_bad_files(tmp_path: Path) -> None:
    good = write_gguf(tmp_path / "model.gguf", "llama", [Kind.F16], {}).read_bytes()
    bad = tmp_path / "bad.gguf"
    for content in (b"", b"GGUF", b"not a model" * 50, good[:900], good[: len(good) // 2]):
        bad.write_bytes(content)
        with pytest.raises(ModelError, match=r"bad\.gguf"):
            opened(bad)
    write_gguf(bad, "qwen3moe", [Kind.F16], {})
    with pytest.raises(ModelError, match="qwen3moe"):
        opened(bad)
    with pytest.raises(ModelError, match="there is no"):
        opened(tmp_path / "absent.gguf")
