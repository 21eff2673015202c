"""An architecture that nobody else has, registered with transformers as a plug-in's would be.

A token's position is looked up in a table, attention and MLP stand side by side, both behind one
norm with a bias, and add to the stream through a learned gate. ``attends`` says how: through
transformers' attention interface; by itself, which knows nothing of rows; or through the interface,
with a sliding window that stands in its mask alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel


class MadeUpConfig(PreTrainedConfig):
    model_type = "made_up"
    vocab_size: int = 300
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 64
    initializer_range: float = 0.2
    sliding_window: int | None = None
    attends: str = "interface"


def eager_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(2, 3) * scaling
    weights = (scores if mask is None else scores + mask).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).contiguous(), weights


class MadeUpLayer(GradientCheckpointingLayer):
    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__()
        self.config, size = config, config.hidden_size
        self.is_causal = True
        self.norm = nn.LayerNorm(size)
        self.wqkv = nn.Linear(size, 3 * size)
        self.wide = nn.Linear(size, 2 * size)
        self.narrow = nn.Linear(2 * size, size)
        self.gate = nn.Parameter(torch.ones(size))

    def forward(self, hidden: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        x = self.norm(hidden)
        split = (*x.shape[:2], 3, self.config.num_attention_heads, -1)
        q, k, v = self.wqkv(x).view(split).permute(2, 0, 3, 1, 4)
        # Keys look back at the values: what a kernel for it does not know of.
        k = k + 0.5 * v.tanh()
        if self.config.attends == "itself":
            unseen = torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype).triu(1)
            seen, _ = eager_attention(self, q, k, v, unseen, 0.2)
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention
            )
            seen, _ = attend(self, q, k, v, attention_mask, scaling=0.2, **kwargs)
        mixed = self.narrow(torch.nn.functional.softplus(self.wide(x)))
        return hidden + self.gate * (seen.flatten(2) + mixed)


class MadeUpPreTrainedModel(PreTrainedModel):
    config_class = MadeUpConfig
    base_model_prefix = "decoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True


class MadeUpModel(MadeUpPreTrainedModel):
    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(MadeUpLayer(config) for _ in range(config.num_hidden_layers))
        self.last = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.words = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden = self.words(input_ids) + self.places(position_ids)
        make = create_causal_mask
        if self.config.attends == "mask":
            make = create_sliding_window_causal_mask
        mask = make(self.config, hidden, attention_mask, None, position_ids=position_ids)
        kwargs.pop("use_cache", None)
        for layer in self.layers:
            hidden = layer(hidden, mask, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.last(hidden))


class MadeUpForCausalLM(MadeUpPreTrainedModel, GenerationMixin):
    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        self.decoder = MadeUpModel(config)
        self.unembed = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.unembed

    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
        hidden = self.decoder(input_ids, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(logits=self.unembed(hidden))


def register() -> None:
    """Make transformers' Auto classes know it."""
    AutoConfig.register("made_up", MadeUpConfig, exist_ok=True)
    AutoModelForCausalLM.register(MadeUpConfig, MadeUpForCausalLM, exist_ok=True)


def made_up(attends: str = "interface", window: int | None = None) -> MadeUpForCausalLM:
    return MadeUpForCausalLM(
        MadeUpConfig(
            attends=attends, sliding_window=window, pad_token_id=0, bos_token_id=1, eos_token_id=2
        )
    )
