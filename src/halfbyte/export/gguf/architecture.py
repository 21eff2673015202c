"""A model's settings and tensors under llama.cpp's names.

Only architectures that halfbyte reads back from GGUF are written, since a file is compared with
its model before it gets its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gguf

from halfbyte.errors import ModelError
from halfbyte.model.names import GGUF_ROPE_FACTORS
from halfbyte.model.skeleton import build_skeleton

if TYPE_CHECKING:
    from torch import Tensor

# Model type of transformers: architecture of llama.cpp.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_FAMILIES = "Llama (SmolLM2, TinyLlama), Mistral, Qwen 2, Qwen 2.5 and Qwen 3"


@dataclass(frozen=True)
class Architecture:
    """What of a transformers configuration llama.cpp wants, and what it cannot be told."""

    name: str  # of llama.cpp
    config: Any  # of transformers
    heads: int
    kv_heads: int
    head_dim: int
    notes: tuple[str, ...]

    def add_settings(self, writer: gguf.GGUFWriter) -> None:
        """Write the metadata that the mathematics needs."""
        config = self.config
        writer.add_context_length(int(config.max_position_embeddings))
        writer.add_embedding_length(int(config.hidden_size))
        writer.add_block_count(int(config.num_hidden_layers))
        writer.add_feed_forward_length(int(config.intermediate_size))
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
        writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
        writer.add_vocab_size(int(config.vocab_size))

    def tensors(self, names: Iterable[str], model: str) -> dict[str, str]:
        """Name in the file: parameter of transformers, in the order of the layers.

        Raises ModelError for a parameter that llama.cpp has no name for.
        """
        kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == self.name)
        table = gguf.get_tensor_name_map(kind, int(self.config.num_hidden_layers))
        there, found = set(names), {}
        for name in build_skeleton(self.config, model).state_dict():
            if name not in there:
                continue
            theirs = table.get_name(name, try_suffixes=(".weight", ".bias"))
            if theirs is None:
                raise ModelError(
                    f"llama.cpp has no place for {name} of {model}, so it cannot be exported to "
                    "GGUF."
                )
            # A tied head is the embedding, and the file holds it once.
            if theirs != "output.weight" or not self.config.tie_word_embeddings:
                found[theirs] = name
        return found

    def rope_divisors(self) -> Tensor | None:
        """What llama.cpp divides the rotary frequencies by, [head_dim / 2] fp32, if anything."""
        rope = self.config.rope_parameters
        if rope.get("rope_type", "default") == "default":
            return None
        import torch
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.config, "cpu")
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        return ((rope["rope_theta"] ** -exponents) / scaled.double()).float()

    def as_stored(self, name: str, values: Tensor) -> Tensor:
        """``values`` as the file has them: rows of q and k of Llama's in another order.

        llama.cpp's rotary embedding turns neighbouring rows of a head, transformers' turns row i
        with row i + D/2: the two halves of each head, [heads, 2, D/2], are interleaved as
        [heads, D/2, 2].
        """
        which = name.split(".")[-2]
        if self.name != "llama" or which not in ("attn_q", "attn_k"):
            return values
        heads = self.heads if which == "attn_q" else self.kv_heads
        halves = values.view(heads, 2, -1, *values.shape[1:])
        return halves.transpose(1, 2).reshape(values.shape)


def architecture_of(config: Any, model: str) -> Architecture:
    """llama.cpp's architecture for the transformers ``config`` of ``model``.

    Raises ModelError for what it has none for, or none that halfbyte can check.
    """
    kind = str(config.model_type)
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"{model} is a {kind!r} model, and to GGUF are exported {_FAMILIES}: for others merge "
            "it (halfbyte merge) and use llama.cpp's convert_hf_to_gguf.py on the merged folder."
        )
    odd = _odd_settings(config, ARCHITECTURES[kind])
    if odd:
        raise ModelError(
            f"{model} has {odd}, which halfbyte cannot read back from GGUF and so cannot check: "
            "merge it (halfbyte merge) and use llama.cpp's convert_hf_to_gguf.py on the merged "
            "folder."
        )
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Architecture(
        name=ARCHITECTURES[kind],
        config=config,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(head_dim),
        notes=_notes(config),
    )


def _odd_settings(config: Any, architecture: str) -> str | None:
    """A setting that the metadata of GGUF, or halfbyte's reading of them, has no place for."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 8192
    if kind not in ("default", "llama3") or (kind == "llama3" and architecture != "llama"):
        return f"a rotary embedding scaled by {kind!r}"
    if kind == "llama3" and (
        rope.get("factor") not in (8, 32) or any(rope.get(k) != v for k, v in llama3.items())
    ):
        return "a rotary embedding scaled otherwise than Llama 3's"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "heads that are turned in part"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act!r}"
    if getattr(config, "mlp_bias", False):
        return "biases in its MLP"
    if architecture == "qwen3" and config.attention_bias:
        return "biases in its attention"
    return None


def _notes(config: Any) -> tuple[str, ...]:
    window = getattr(config, "sliding_window", None)
    if not window or "sliding_attention" not in (
        getattr(config, "layer_types", None) or ["sliding_attention"]
    ):
        return ()
    return (
        f"attention sees {window:,} tokens back in training and everything in llama.cpp, which "
        "has no window for this architecture: they are the same up to that length",
    )


def rope_tensor_name() -> str:
    """The name of the tensor that holds :meth:`Architecture.rope_divisors`."""
    return GGUF_ROPE_FACTORS
