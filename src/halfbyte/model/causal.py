"""The model as training sees it: hidden states and losses of batches without padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from halfbyte.data.batch import Batch, TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.errors import ModelError
from halfbyte.kernels.choice import PLAIN, Kernels
from halfbyte.kernels.loss import cross_entropy_at, cross_entropy_sum
from halfbyte.kernels.trained_head import trained_head_loss
from halfbyte.model.attention import set_attention, use_varlen_attention
from halfbyte.model.fused import FusedNetwork
from halfbyte.model.head import find_head
from halfbyte.model.host_reads import HostReads
from halfbyte.model.rotary import use_row_rotary
from halfbyte.model.trained_rows import TrainedRows
from halfbyte.model.varlen import DeviceRows, NoKernelError
from halfbyte.model.windows import short_windows
from halfbyte.quant.linear import DropoutPosition, QLoRALinear


class QLoRAModel:
    """A quantized transformers model with its adapter.

    ``network`` is the transformers causal LM, ``lora`` its adapted layers by full name, ``rows``
    what of embedding and head is trained (:mod:`halfbyte.model.trained_rows`). The
    products are made in ``compute_dtype``; the residual stream, norms and the softmax of the loss
    are in the type that the embeddings have been kept in and fp32, as autocast would have them.
    """

    def __init__(
        self,
        network: Any,
        lora: dict[str, QLoRALinear],
        compute_dtype: torch.dtype,
        rows: dict[str, TrainedRows] | None = None,
    ) -> None:
        self.network = network
        self.lora = lora
        self.rows = rows or {}
        self.compute_dtype = compute_dtype
        self.head = find_head(network)
        # Not the embedding's, which may lie in main memory.
        self.device: torch.device = self.head.weight.device
        self.fused: FusedNetwork | None = None
        self.kernels: Kernels | None = None
        self._own_dropout = _has_dropout(network.config)
        self._adapter_on = True
        with short_windows(network):
            theirs = _own_logits(self)
            use_row_rotary(network)
            use_varlen_attention(network)
            _check_logits(self, theirs)

    @property
    def position(self) -> DropoutPosition | None:
        """Where training stands, for the dropout masks."""
        return next((layer.position for layer in self.lora.values()), None)

    @property
    def linears(self) -> dict[str, QLoRALinear]:
        """All quantized layers by full name, adapted or not."""
        return {n: m for n, m in self.network.named_modules() if isinstance(m, QLoRALinear)}

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """All that is trained, in the model's order.

        ``{layer}.lora_A``, ``{layer}.lora_B`` and, with DoRA, ``{layer}.lora_magnitude_vector``;
        then the rows of embedding and head that are trained.
        """
        found: dict[str, nn.Parameter] = {}
        for name, layer in self.lora.items():
            assert layer.lora_A is not None
            assert layer.lora_B is not None
            found[f"{name}.lora_A"], found[f"{name}.lora_B"] = layer.lora_A, layer.lora_B
            if layer.lora_magnitude_vector is not None:
                found[f"{name}.lora_magnitude_vector"] = layer.lora_magnitude_vector
        found |= {key: rows.values for key, rows in self.rows.items()}
        return found

    def adapter(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A [r, in] and B [out, r] by the layer's full name, as adapter files hold them."""
        found = self.lora_parameters()
        return {
            name: (found[f"{name}.lora_A"].detach(), found[f"{name}.lora_B"].detach())
            for name in self.lora
        }

    def magnitudes(self) -> dict[str, Tensor]:
        """DoRA's magnitudes [out] by the layer's full name."""
        found = {name: layer.lora_magnitude_vector for name, layer in self.lora.items()}
        return {name: vector.detach() for name, vector in found.items() if vector is not None}

    def initial(self) -> dict[str, tuple[Tensor, Tensor]]:
        """With PiSSA, A and B of each layer as they started; else empty."""
        return {name: layer.initial for name, layer in self.lora.items() if layer.initial}

    @torch.no_grad()
    def put_adapter(
        self,
        layers: Mapping[str, tuple[Tensor, Tensor]],
        magnitudes: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Copy A and B of each layer of ``layers``, and its magnitudes, into the model."""
        ours = self.adapter()
        for name, (a, b) in layers.items():
            ours[name][0].copy_(a)
            ours[name][1].copy_(b)
        vectors = self.magnitudes()
        for name, vector in (magnitudes or {}).items():
            vectors[name].copy_(vector)
        self.adapter_changed()

    def adapter_changed(self) -> None:
        """To be called when what is trained has been written to: there are copies of it."""
        for rows in self.rows.values():
            rows.write()
        if self.fused is not None:
            self.fused.adapter_changed()

    def use_kernels(self, kernels: Kernels) -> None:
        """Attend and take the loss by ``kernels``, which leave the values of a batch on the device.

        Raises NoKernelError, and leaves all as it was, where no kernel does what the network's
        attention does.
        """
        batch, training = _two_rows(), self.network.training
        self.network.eval()
        self.kernels = None
        try:
            with torch.no_grad():
                plain = self.logits(batch)
                self.kernels = kernels
                found = self.logits(batch)
            if not _near(found, plain, self.compute_dtype):
                raise NoKernelError("the kernel does not compute its attention")
        except Exception as error:  # also whatever a compiler says of a GPU that it does not know
            self.kernels = None
            raise NoKernelError(str(error).split("\n")[0]) from error
        finally:
            self.network.train(training)

    def host_reads(self) -> str | None:
        """What in a pass over a batch waits for the device, in words; None: nothing."""
        kernels = self.kernels if self.fused is None else self.fused.kernels
        if kernels is None or kernels.attention is PLAIN.attention:
            return "its attention goes through the rows one by one"
        if self.fused is not None:
            return None
        batch = _two_rows().to(self.device)
        with torch.no_grad(), HostReads() as reads:
            self.hidden(batch)
        if not reads.found:
            return None
        names = ", ".join(sorted(set(reads.found)))
        return f"{type(self.network).__name__} makes the host wait for the device ({names})"

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [T, hidden]; the batch lies on the model's device or the CPU."""
        borders: list[int] | DeviceRows
        if self.kernels is None:
            borders = batch.cu_seqlens.tolist()
            batch = batch.to(self.device)
        else:
            batch = batch.to(self.device)
            borders = DeviceRows(batch.cu_seqlens, batch.max_seqlen, self.kernels)
        out = self.network.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            row_borders=borders,
        )
        return out.last_hidden_state[0]

    def loss_sum(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropies of the batch's labels, fp32 scalar.

        Fused layers, where there are any, do it if no gradient is asked for.
        """
        if self.fused is not None and self._adapter_on and not torch.is_grad_enabled():
            return self.fused.loss_sum(batch.to(self.device))
        hidden = self.hidden(batch)
        weight = self.head.weight.to(self.compute_dtype)
        trained = next((rows for rows in self.rows.values() if rows.in_head), None)
        if trained is not None and torch.is_grad_enabled():
            batch = batch.to(self.device)
            labels = batch.labels
            if len(batch.label_ids) < len(hidden):
                hidden, labels = hidden.index_select(0, batch.label_index), batch.label_ids
            return trained_head_loss(
                hidden,
                weight,
                trained.values,
                labels,
                first=trained.first,
                scale=self.head.scale,
                softcap=self.head.softcap,
            )
        if self.kernels is not None:
            batch = batch.to(self.device)
            return cross_entropy_at(
                hidden,
                weight,
                batch.labels,
                batch.label_index,
                batch.label_ids,
                self.kernels.head_loss,
                scale=self.head.scale,
                softcap=self.head.softcap,
            )
        return cross_entropy_sum(
            hidden,
            weight,
            batch.labels.to(self.device),
            batch.num_labels,
            scale=self.head.scale,
            softcap=self.head.softcap,
        )

    def begin_step(self, number: int) -> None:
        """To be called at the beginning of step ``number``.

        What the network drops by itself comes out of PyTorch's generators. They begin anew with
        each step, so that a seed makes one training, and a run that goes on the same.
        """
        if self._own_dropout and self.position is not None:
            torch.manual_seed((self.position.seed << 32) + number)

    def loss_and_gradients(self, batch: Batch, factor: Tensor) -> Tensor:
        """The loss sum, fp32 scalar, and ``factor`` times its gradients added to the adapters'.

        ``factor`` is an fp32 scalar on the device. Dropout is as :attr:`position` says.
        """
        if self.fused is not None:
            keys = None if self.position is None else self.position.keys
            return self.fused.loss_and_gradients(batch, factor, keys)
        loss = self.loss_sum(batch)
        (loss * factor).backward()
        return loss.detach()

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
        if self.fused is not None:
            self.fused.use_recomputation(on)
        # transformers 5.23 has renamed both; it warns at the old names.
        renamed = hasattr(network, "activation_checkpointing_enable")
        if not on:
            off = "activation" if renamed else "gradient"
            getattr(network, f"{off}_checkpointing_disable")()
            return
        # Our dropout masks are made again from their keys; a model's own come out of a generator.
        how = {"use_reentrant": False, "preserve_rng_state": self._own_dropout}
        if renamed:
            network.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
        else:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)

    @contextmanager
    def adapter_on(self, on: bool) -> Iterator[None]:
        """With the adapter, or the base model alone, while the context lasts."""
        before = self._adapter_on
        self._switch(on)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, on: bool) -> None:
        self._adapter_on = on
        for layer in self.lora.values():
            layer.adapter_enabled = on
        for rows in self.rows.values():
            rows.write() if on else rows.restore()


# Two short rows, with which our logits are compared with the network's own.
_ROWS = (tuple(range(1, 25)), tuple(range(40, 20, -1)))
# How far they may be apart: in fp32 a share of the largest logit at every position, in 16 bits the
# distance at the middle one of a row's positions, as a share of the logits' length there. Rounding
# in 16 bits is small nearly everywhere and not at a few positions: in bf16 SmolLM2's middle
# position is 0.012 apart, and its worst 0.84, of which transformers' own part is 0.73. A mistake is
# everywhere behind where it begins.
_APART = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}


@torch.no_grad()
def _own_logits(model: QLoRAModel) -> Tensor:
    """Logits [T, vocab] of each row alone as transformers runs it, with its plain attention."""
    network = model.network
    set_attention(network, "eager")
    network.eval()
    # Autocast, since plain attention multiplies fp32 queries with values of the products' type.
    mixed = model.compute_dtype != torch.float32
    with torch.autocast(model.device.type, model.compute_dtype, enabled=mixed):
        rows = [torch.tensor([row], device=model.device) for row in _ROWS]
        own = [network(input_ids=ids, use_cache=False).logits[0].float() for ids in rows]
    return torch.cat(own)


@torch.no_grad()
def _check_logits(model: QLoRAModel, theirs: Tensor) -> None:
    """Both rows end to end must give the logits of each alone.

    They do not where the network has an attention of its own, which sees across the border, or
    does something to scores, hidden states or logits that we do not know of.
    """
    ours = model.logits(_two_rows())
    model.network.train()
    if not _near(ours, theirs, model.compute_dtype):
        raise ModelError(
            f"{type(model.network).__name__} attends or ends in a way that halfbyte does not know, "
            "so that it would be trained wrongly; choose another model."
        )


def attention_dropout(config: Any) -> float:
    """The share of attention's probabilities that a network of transformers drops in training.

    Ours never does.
    """
    return max((p for name, p in _dropouts(config).items() if name.startswith("att")), default=0.0)


def _has_dropout(config: Any) -> bool:
    """Whether the network drops anything else by itself."""
    return any(not name.startswith("att") for name in _dropouts(config))


def _dropouts(config: Any) -> dict[str, float]:
    """Names and shares of all dropouts of a configuration that are not 0."""
    return {
        name: value
        for name, value in config.get_text_config().to_dict().items()
        if ("dropout" in name or name.endswith("pdrop"))
        and isinstance(value, float)
        and value > 0.0
    }


def _two_rows() -> Batch:
    return make_batch(
        [
            TokenizedRow(np.array(ids, dtype=np.int32), np.zeros(len(ids), dtype=bool), row)
            for row, ids in enumerate(_ROWS)
        ]
    )


def _near(ours: Tensor, theirs: Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether logits [T, vocab] of ``_ROWS`` are the same but for rounding."""
    if compute_dtype == torch.float32:
        apart = (ours - theirs).abs().max().item()
        return apart <= _APART[compute_dtype] * theirs.abs().max().item()
    shares = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    middle = [row.median().item() for row in shares.split([len(row) for row in _ROWS])]
    return all(share <= _APART[compute_dtype] for share in middle)
