"""A whole decoder made of fused layers, for the families whose layers are Llama's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.data.batch import Batch
from halfbyte.kernels.choice import Kernels
from halfbyte.kernels.gather_rows import fetch_rows
from halfbyte.kernels.lora_group import make_fold
from halfbyte.model.fusable import (
    ACTIVATIONS,
    NOT_ALL_IN_NF4,
    why_adapters_not_fused,
    why_not_fused,
)
from halfbyte.model.fused_layer import FusedLayer, LayerShape, Rows
from halfbyte.model.head import Head
from halfbyte.quant.joined import FlatAdapter, JoinedLinear, Scratch
from halfbyte.quant.linear import QLoRALinear
from halfbyte.quant.nf4 import NF4Weight

# Of 16-bit logits in memory at once; and where memory is short, at some cost in time.
LOGIT_BYTES = 128 * 1024**2
FEW_LOGIT_BYTES = 32 * 1024**2


class NotFusedError(Exception):
    """Why a network cannot be made of fused layers."""


class FusedNetwork:
    """The network's weights in fused layers; the network itself works as before.

    What it computes is the network's loss and the gradients of its adapters, with the residual
    stream in the embeddings' type as there, and sums rounded once where transformers rounds twice.
    """

    def __init__(self, network: Any, head: Head, compute_dtype: torch.dtype, kernels: Kernels):
        """Raises NotFusedError for a network of another kind."""
        self.kernels, self.compute_dtype = kernels, compute_dtype
        adapted = [
            module
            for module in network.modules()
            if isinstance(module, QLoRALinear) and module.lora_A is not None
        ]
        reason = why_not_fused(network) or why_adapters_not_fused(
            [len(layer.lora_A) for layer in adapted if layer.lora_A is not None],
            [layer.scale for layer in adapted],
            any(layer.lora_magnitude_vector is not None for layer in adapted),
        )
        if reason is not None:
            raise NotFusedError(reason)
        base = network.base_model
        self.config = network.config.get_text_config()
        self.embedding: Tensor = network.get_input_embeddings().weight
        self.device = head.weight.device
        self.norm: Tensor = base.norm.weight
        # The embedding may be kept in 16 bits where the stream is in fp32: the same values.
        self.stream_dtype = self.norm.dtype
        self.head = Head(head.weight.to(compute_dtype), head.scale, head.softcap)
        self.rotary = base.rotary_emb
        self.layers = [_fused_layer(layer, self.config, kernels) for layer in base.layers]
        self.cos = self.sin = torch.empty(0, device=self.device)
        self._rotations: list[tuple[Tensor, Tensor]] = []
        self.adapter: FlatAdapter | None = None
        self._fold: Any = None

    @property
    def joined(self) -> list[JoinedLinear]:
        return [joined for layer in self.layers for joined in layer.joined]

    def keep_copies(self, count: int | None = None) -> int:
        """Keep the weights of the first ``count`` layers (all by default) dequantized.

        Their adapters are folded in. Returns the bytes. Which layers they are makes no difference:
        a layer without a copy is dequantized once in each pass.
        """
        return sum(joined.keep() for layer in self.layers[:count] for joined in layer.joined)

    def use_scratch(self) -> int:
        """Dequantize the weights of which no copy is kept into the same memory when wanted.

        Returns its bytes: those of one layer, since a layer's backward pass wants all four.
        """
        size = 0
        found: dict[tuple[int, int, int], Scratch] = {}
        for layer in self.layers:
            for kind, joined in enumerate(layer.joined):
                if joined.kept is not None:
                    continue
                key = (kind, joined.rows, joined.width)
                if key not in found:
                    scratch = Scratch(joined.rows, joined.width, joined.dtype, joined.device)
                    found[key] = scratch
                    size += scratch.weight.nbytes
                joined.use_scratch(found[key])
        return size

    @property
    def logit_bytes(self) -> int:
        """Of logits in memory at once: few where all layers are recomputed to save memory."""
        return FEW_LOGIT_BYTES if all(layer.recompute for layer in self.layers) else LOGIT_BYTES

    def use_recomputation(self, on: bool) -> None:
        """Make each layer again in the backward pass from its input alone, or keep all of it."""
        self.recompute_layers(len(self.layers) if on else 0)

    def recompute_layers(self, count: int) -> None:
        """Make the first ``count`` layers again, and keep what the others need.

        The backward pass begins with the last layers: by the time that it makes one again, all
        that the others kept has been given back.
        """
        for number, layer in enumerate(self.layers):
            layer.recompute = number < count

    @property
    def recomputed_layers(self) -> int:
        return sum(layer.recompute for layer in self.layers)

    @torch.no_grad()
    def kept_bytes(self, batch: Batch) -> int:
        """Bytes that the layers keep of a forward pass over ``batch`` for the backward pass.

        What a layer keeps is counted and let go, so that it need not fit with all the others'.
        """
        batch = batch.to(self.device)
        rows = self._rows(batch, None)
        stream, y = self._embed(batch), None
        total = 0
        for layer in self.layers:
            stream, y, saved = layer.forward(stream, y, rows, save=True)
            assert saved is not None
            tensors = [value for value in vars(saved).values() if value is not None]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
            total += sum(storage.nbytes() for storage in storages.values())
        return total

    def attach(self, adapter: FlatAdapter) -> None:
        """Train the adapters where the optimizer has them."""
        self.adapter = adapter
        for joined in self.joined:
            joined.attach(adapter)
        kept = [
            (j.group, j.kept) for j in self.joined if j.group is not None and j.kept is not None
        ]
        self._fold = make_fold(kept) if kept else None
        self.adapter_changed()

    def adapter_changed(self) -> None:
        """Round the adapters to the products' type again, and fold B into the kept weights."""
        assert self.adapter is not None
        self.adapter.shadow.copy_(self.adapter.values)
        self.fold()

    def fold(self) -> None:
        """Fold B into the kept weights again."""
        if self._fold is not None:
            self.kernels.fold_b(self._fold)

    def prepare(self, positions: int) -> None:
        """Make the rotations of so many positions; they must be there before a capture.

        Earlier ones stay where they are: a captured pass reads those that it was captured with,
        and an evaluation of longer rows may come after it.
        """
        if len(self.cos) >= positions:
            return
        like = torch.empty(1, dtype=torch.float32, device=self.device)
        at = torch.arange(positions, device=self.device)[None]
        cos, sin = self.rotary(like, at)
        half = cos.shape[-1] // 2
        self.cos, self.sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        self._rotations.append((self.cos, self.sin))

    @torch.no_grad()
    def loss_sum(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropies of the batch's labels, fp32 scalar; no dropout."""
        rows = self._rows(batch, None)
        stream, y = self._embed(batch), None
        for layer in self.layers:
            stream, y, _ = layer.forward(stream, y, rows, save=False)
        assert y is not None
        hidden, _, _ = self._last_norm(stream, y)
        one = torch.ones((), device=self.device)
        chosen, labels, _ = _labelled(hidden, batch)
        return self._head_loss(chosen, labels, one, None)

    @torch.no_grad()
    def loss_and_gradients(self, batch: Batch, factor: Tensor, keys: Tensor | None) -> Tensor:
        """The loss sum, and ``factor`` times its gradients added where the optimizer has them.

        ``factor`` fp32 scalar on the device: the loss scale over the labels of the step. ``keys``
        int32 [modules, 2] of the dropout masks, None for none. No value is read by the host.
        """
        rows = self._rows(batch, keys)
        stream, y = self._embed(batch), None
        kept = []
        for layer in self.layers:
            stream, y, saved = layer.forward(stream, y, rows, save=True)
            kept.append(saved)
        assert y is not None
        hidden, stream, rstd = self._last_norm(stream, y)
        del y

        chosen, labels, at = _labelled(hidden, batch)
        d_chosen = torch.empty_like(chosen)
        loss = self._head_loss(chosen, labels, factor, d_chosen)
        d_hidden = d_chosen
        if at is not None:
            # Each position takes its own from where it was gathered to. Putting them back by index
            # would have them sorted first, since PyTorch does not know that no two are the same.
            learned = batch.labels != -100
            place = learned.cumsum(0).sub_(1).clamp_(min=0)
            d_hidden = d_chosen.index_select(0, place).masked_fill_(~learned[:, None], 0.0)
            del learned, place
        del chosen, d_chosen, hidden

        d_stream = torch.empty_like(stream)
        d_c = d_stream
        if self.stream_dtype != self.compute_dtype:
            d_c = torch.empty_like(d_stream, dtype=self.compute_dtype)
        self.kernels.rms_norm_backward(
            d_hidden,
            stream,
            rstd,
            self.norm,
            d_stream,
            None if d_c is d_stream else d_c,
            first=True,
        )
        del d_hidden, stream
        for layer in reversed(self.layers):
            saved = kept.pop()
            assert saved is not None
            layer.backward(d_stream, d_c, saved, rows)
        return loss

    def _rows(self, batch: Batch, keys: Tensor | None) -> Rows:
        self.prepare(batch.max_seqlen)
        # A weight that an earlier pass left in scratch memory has an older B, and a captured pass
        # must make its own whatever came before it.
        for joined in self.joined:
            if joined.scratch is not None:
                joined.scratch.owner = None
        return Rows(
            batch.position_ids, batch.cu_seqlens, batch.max_seqlen, self.cos, self.sin, keys
        )

    def _embed(self, batch: Batch) -> Tensor:
        if self.embedding.device == self.device:
            rows = self.embedding.index_select(0, batch.input_ids)
        else:
            rows = fetch_rows(self.embedding, batch.input_ids)
        return rows.to(self.stream_dtype)

    def _last_norm(self, stream: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden states [T, H] in the products' type, the stream before the norm, 1 / rms)."""
        summed = torch.empty_like(stream)
        hidden = torch.empty_like(stream, dtype=self.compute_dtype)
        rstd = torch.empty(len(stream), dtype=torch.float32, device=self.device)
        eps = self.layers[0].shape.eps
        self.kernels.rms_norm(stream, y, self.norm, eps, summed, hidden, rstd)
        return hidden, summed, rstd

    def _head_loss(
        self, hidden: Tensor, labels: Tensor, factor: Tensor, d_hidden: Tensor | None
    ) -> Tensor:
        loss: Tensor = self.kernels.head_loss(
            hidden,
            self.head.weight,
            labels,
            factor,
            d_hidden,
            scale=self.head.scale,
            softcap=self.head.softcap,
            chunk_bytes=self.logit_bytes,
        )
        return loss


def _labelled(hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states and labels of the labelled positions, and their index; None: all of them."""
    if len(batch.label_ids) >= len(hidden):
        return hidden, batch.labels, None
    return hidden.index_select(0, batch.label_index), batch.label_ids, batch.label_index


def _fused_layer(layer: Any, config: Any, kernels: Kernels) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    head_dim = int(attention.head_dim)
    linears: list[QLoRALinear] = [
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    ]
    for linear in linears:
        if not isinstance(linear, QLoRALinear) or not isinstance(linear.base, NF4Weight):
            raise NotFusedError(NOT_ALL_IN_NF4)
        if linear.in_features % linear.base.block_size:
            raise NotFusedError("a row of its weights is no whole number of blocks")
    q, k, v, o, gate, up, down = linears
    shape = LayerShape(
        heads=q.out_features // head_dim,
        kv_heads=k.out_features // head_dim,
        head_dim=head_dim,
        scale=float(attention.scaling),
        eps=float(layer.input_layernorm.variance_epsilon),
        activation=ACTIVATIONS[config.hidden_act],
    )
    return FusedLayer(
        shape,
        kernels,
        norm1=layer.input_layernorm.weight,
        norm2=layer.post_attention_layernorm.weight,
        qkv=JoinedLinear([q, k, v], kernels),
        o=JoinedLinear([o], kernels),
        gate_up=JoinedLinear([gate, up], kernels),
        down=JoinedLinear([down], kernels),
        window=_window(attention, config),
    )


def _window(attention: Any, config: Any) -> int | None:
    """How many last positions a layer sees; Qwen2's layers differ, and say it themselves."""
    if type(attention).__name__ == "LlamaAttention":
        return None
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(config, "sliding_window", None)
