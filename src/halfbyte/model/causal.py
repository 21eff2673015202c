"""The model as training sees it: hidden states and losses of batches without padding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.data.batch import Batch
from halfbyte.errors import ModelError
from halfbyte.kernels.loss import cross_entropy_sum
from halfbyte.model.attention import use_varlen_attention
from halfbyte.quant.linear import DropoutPosition, QLoRALinear


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: ``softcap · tanh(scale · h Wᵀ / softcap)``."""

    weight: Tensor  # [vocab, hidden]
    scale: float
    softcap: float | None


class QLoRAModel:
    """A quantized transformers model with its adapter.

    ``network`` is the transformers causal LM, ``lora`` its adapted layers by full name. The
    products are made in ``compute_dtype``; the residual stream, norms and the softmax of the loss
    are in the type that the embeddings have been kept in and fp32, as autocast would have them.
    """

    def __init__(
        self, network: Any, lora: dict[str, QLoRALinear], compute_dtype: torch.dtype
    ) -> None:
        self.network = network
        self.lora = lora
        self.compute_dtype = compute_dtype
        self.device: torch.device = network.get_input_embeddings().weight.device
        use_varlen_attention(network)
        self.head = _find_head(network)
        _check_head(self)

    @property
    def position(self) -> DropoutPosition | None:
        """Where training stands, for the dropout masks."""
        return next((layer.position for layer in self.lora.values()), None)

    @property
    def linears(self) -> dict[str, QLoRALinear]:
        """All quantized layers by full name, adapted or not."""
        return {n: m for n, m in self.network.named_modules() if isinstance(m, QLoRALinear)}

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """``{layer}.lora_A`` and ``{layer}.lora_B`` in the model's order."""
        found: dict[str, nn.Parameter] = {}
        for name, layer in self.lora.items():
            assert layer.lora_A is not None
            assert layer.lora_B is not None
            found[f"{name}.lora_A"], found[f"{name}.lora_B"] = layer.lora_A, layer.lora_B
        return found

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [T, hidden]; the batch lies on the model's device or the CPU."""
        borders = batch.cu_seqlens.tolist()
        batch = batch.to(self.device)
        out = self.network.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            row_borders=borders,
        )
        return out.last_hidden_state[0]

    def loss_sum(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropies of the batch's labels, fp32 scalar."""
        return cross_entropy_sum(
            self.hidden(batch),
            self.head.weight.to(self.compute_dtype),
            batch.labels.to(self.device),
            batch.num_labels,
            scale=self.head.scale,
            softcap=self.head.softcap,
        )

    def logits(self, batch: Batch) -> Tensor:
        """All logits [T, vocab] in fp32: for checks on short batches."""
        z = self.hidden(batch).to(self.compute_dtype) @ self.head.weight.to(self.compute_dtype).t()
        z = z.float() * self.head.scale
        return (
            z
            if self.head.softcap is None
            else self.head.softcap * torch.tanh(z / self.head.softcap)
        )

    def use_gradient_checkpointing(self, on: bool) -> None:
        """Recompute each decoder layer in the backward pass, or keep its activations."""
        network = self.network
        # transformers 5.23 has renamed both; it warns at the old names.
        renamed = hasattr(network, "activation_checkpointing_enable")
        if not on:
            off = "activation" if renamed else "gradient"
            getattr(network, f"{off}_checkpointing_disable")()
            return
        # Dropout masks are made again from their keys: there is no generator state to save.
        how = {"use_reentrant": False, "preserve_rng_state": False}
        if renamed:
            network.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
        else:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)

    @contextmanager
    def adapter_on(self, on: bool) -> Iterator[None]:
        """With the adapter, or the base model alone, while the context lasts."""
        for layer in self.lora.values():
            layer.adapter_enabled = on
        try:
            yield
        finally:
            for layer in self.lora.values():
                layer.adapter_enabled = True


def _find_head(network: Any) -> Head:
    config = network.config.get_text_config()
    head = network.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None or network.base_model is network:
        raise ModelError(
            f"the output head of {type(network).__name__} is not one matrix on top of its decoder, "
            "which is what halfbyte trains; choose another model."
        )
    # Granite divides its logits, Cohere multiplies them, Gemma 2 caps them.
    scale = getattr(config, "logit_scale", None) or 1.0 / (
        getattr(config, "logits_scaling", None) or 1.0
    )
    return Head(head.weight, float(scale), getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def _check_head(model: QLoRAModel) -> None:
    """Our logits must be the model's own, or its head does something we do not know of."""
    training = model.network.training
    model.network.eval()
    ids = torch.arange(1, 9, device=model.device)
    batch = Batch(
        ids,
        torch.arange(8, device=model.device),
        torch.tensor([0, 8]),
        torch.full_like(ids, -100),
        8,
        0,
    )
    ours = model.logits(batch)
    theirs = (
        model.network(
            input_ids=ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            row_borders=[0, 8],
        )
        .logits[0]
        .float()
    )
    model.network.train(training)
    apart = (ours - theirs).abs().max().item()
    if not apart <= 0.05 * theirs.abs().max().item():
        raise ModelError(
            f"the logits of {type(model.network).__name__} are not its last hidden states times "
            "its head, so its loss cannot be computed as halfbyte does; choose another model."
        )
