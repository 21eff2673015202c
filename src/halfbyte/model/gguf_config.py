"""The configuration of a model in a GGUF file.

Only architectures whose metadata say all that transformers' model needs are read; a file that
leaves something out would load and be silently wrong.
"""

from __future__ import annotations

import math
from typing import Any

from halfbyte.errors import ModelError
from halfbyte.model.gguf_file import GgufFile
from halfbyte.model.names import GGUF_ROPE_FACTORS
from halfbyte.model.plausible import require_layers, require_plausible
from halfbyte.model.wording import reason

ARCHITECTURES = ("llama", "qwen2", "qwen3")

# Key of the metadata after the architecture's name: key of the transformers config.
_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
# The size of a head where it is not the hidden size over the heads.
_HEAD_DIM = {"llama": "rope.dimension_count", "qwen3": "attention.key_length"}
_TOKEN_IDS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def gguf_config(file: GgufFile, name: str) -> Any:
    """The transformers config of ``file``.

    Raises ModelError for an architecture that is not read, and for settings that transformers'
    model of it lacks.
    """
    from transformers import AutoConfig

    kind = file.architecture
    if kind not in ARCHITECTURES or file.metadata.get(f"{kind}.expert_count"):
        raise ModelError(
            f"the GGUF file of {name} is of the architecture {kind!r}"
            + (" with a mixture of experts" if kind in ARCHITECTURES else "")
            + f", and only {', '.join(ARCHITECTURES)} are read from GGUF: name the model's "
            "safetensors folder."
        )
    keys = dict(_KEYS)
    if kind in _HEAD_DIM:
        keys[_HEAD_DIM[kind]] = "head_dim"
    found = {
        ours: file.metadata[f"{kind}.{theirs}"]
        for theirs, ours in keys.items()
        if f"{kind}.{theirs}" in file.metadata
    }
    require_plausible({key: _plain(value) for key, value in found.items()}, str(file.path))
    found.setdefault("vocab_size", file.lengths.get("tokenizer.ggml.tokens"))
    lost = [k for k in ("num_hidden_layers", "hidden_size", "vocab_size") if found.get(k) is None]
    if lost:
        raise ModelError(f"{file.path} does not say its {', '.join(lost)}: get it again.")
    for ours, theirs in _TOKEN_IDS.items():
        if f"tokenizer.ggml.{theirs}_token_id" in file.metadata:
            found[f"{ours}_token_id"] = file.metadata[f"tokenizer.ggml.{theirs}_token_id"]
    tensors = set(file.names())
    found["tie_word_embeddings"] = "output.weight" not in tensors
    if kind == "llama":
        found["attention_bias"] = "blk.0.attn_q.bias" in tensors
    try:
        theta = float(found.pop("rope_theta", 10000.0))
        found["rope_parameters"] = _rope(file, name, theta, found)
        config = AutoConfig.for_model(kind, **found)
    except ModelError:
        raise
    except Exception as error:  # whatever a figure of a wrong kind leads to
        raise ModelError(
            f"the metadata of {file.path} are not a model's configuration: {reason(error)}."
        ) from error
    require_layers(config, len(tensors), name)
    return config


def _plain(value: Any) -> Any:
    """``value`` as JSON would have it: numpy's numbers as Python's."""
    return value.item() if hasattr(value, "item") else value


def _rope(file: GgufFile, name: str, theta: float, config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding's parameters.

    Llama 3's scaled frequencies are stored as a tensor of divisors, not as the settings that made
    them; those are found again by trying the ones that there are (8 for Llama 3.1, 32 for 3.2).
    """
    scaling = file.metadata.get(f"{file.architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise ModelError(
            f"the GGUF file of {name} scales its rotary embedding ({scaling}), which is not read "
            "from GGUF: name the model's safetensors folder."
        )
    plain = {"rope_type": "default", "rope_theta": theta}
    if GGUF_ROPE_FACTORS not in file.names():
        return plain
    import torch

    divisors = file.read(GGUF_ROPE_FACTORS).flatten()
    if torch.equal(divisors, torch.ones_like(divisors)):
        return plain
    for factor in (8.0, 32.0):
        tried = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if torch.allclose(divisors, _llama3_divisors(tried, 2 * len(divisors)), rtol=1e-4):
            return tried
    raise ModelError(
        f"the GGUF file of {name} scales its rotary embedding by a table that is none of Llama "
        "3's: name the model's safetensors folder."
    )


def _llama3_divisors(rope: dict[str, Any], head_dim: int) -> Any:
    """What Llama 3.1 divides each frequency by: 1 for short waves, ``factor`` for long ones."""
    import torch

    old, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    waves = 2 * math.pi * rope["rope_theta"] ** exponents
    smooth = ((old / waves - low) / (high - low)).clamp(0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)
