"""One decoder layer, forward and backward by hand.

    s₁ = s + y       n₁ = norm(s₁)    [q k v] = n₁ W'_qkv     a = attention(rope(q), rope(k), v)
    s₂ = s₁ + a W'_o    n₂ = norm(s₂)    [g u] = n₂ W'_gu     y⁺ = (act(g) · u) W'_down

s is the residual stream, y what the layer before adds to it; W' has the adapters folded in
(:mod:`halfbyte.quant.joined`). Four large products each way and, between them, as few passes over
memory as there can be: on an H100 the step of a small model is bound by the number of launches and
of passes. Nothing goes through autograd: the gradients of A and B are added where the optimizer has
them, the base has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.choice import Kernels
from halfbyte.quant.joined import JoinedLinear


@dataclass(frozen=True)
class LayerShape:
    """What the layers of a model have in common."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # of attention's scores
    eps: float  # of the norms
    activation: str


@dataclass(frozen=True)
class Rows:
    """Where the rows of a batch lie, and the rotation of each position."""

    position_ids: Tensor  # int64 [T]
    cu_seqlens: Tensor  # int32 [rows + 1]
    max_seqlen: int
    cos: Tensor  # fp32 [positions, head_dim / 2]
    sin: Tensor
    keys: Tensor | None  # of the dropout masks, int32 [modules, 2]; None drops nothing


@dataclass
class Saved:
    """What the backward pass of a layer reads; with recomputation only ``s1`` is there before."""

    s1: Tensor  # [T, H] in the stream's type: the input of the first norm
    r1: Tensor | None = None  # fp32 [T]: 1 / rms
    x_qkv: Tensor | None = None  # [T, H + extra]: the normed input and its u; only with adapters
    qkv: Tensor | None = None  # [T, (heads + 2 kv_heads) head_dim], rotated
    lse: Tensor | None = None
    x_o: Tensor | None = None  # [T, heads · head_dim + extra]: attention's output and its u
    s2: Tensor | None = None  # [T, H]
    r2: Tensor | None = None
    x_gate_up: Tensor | None = None  # as x_qkv
    gate_up: Tensor | None = None  # [T, 2 I]


class FusedLayer:
    """The layer's weights, and the two passes over them."""

    def __init__(
        self,
        shape: LayerShape,
        kernels: Kernels,
        *,
        norm1: Tensor,
        norm2: Tensor,
        qkv: JoinedLinear,
        o: JoinedLinear,
        gate_up: JoinedLinear,
        down: JoinedLinear,
        window: int | None,
    ) -> None:
        self.shape, self.kernels, self.window = shape, kernels, window
        self.norm1, self.norm2 = norm1, norm2
        self.qkv, self.o, self.gate_up, self.down = qkv, o, gate_up, down
        self.recompute = False

    @property
    def joined(self) -> tuple[JoinedLinear, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def forward(
        self, stream: Tensor, y: Tensor | None, rows: Rows, save: bool
    ) -> tuple[Tensor, Tensor, Saved | None]:
        """(s₂, y⁺, saved) from ``stream`` [T, H] and ``y`` [T, H], None for the first layer."""
        s1 = stream if y is None else torch.empty_like(stream)
        saved = Saved(s1)
        self._attend(stream, y, saved, rows)
        self._gate(saved, rows)
        assert saved.s2 is not None
        assert saved.gate_up is not None
        act = self._input(self.down, saved.gate_up, rows, self._activate)
        y_down = self.down.product(act)
        s2 = saved.s2
        if not save:
            return s2, y_down, None
        return s2, y_down, Saved(s1) if self.recompute else saved

    def backward(self, d_stream: Tensor, d_c: Tensor, saved: Saved, rows: Rows) -> None:
        """Turn dL/d(s₂ + y⁺) into dL/d(s + y), in place.

        ``d_stream`` [T, H] in the stream's type, ``d_c`` the same in the products' type.
        """
        k, shape = self.kernels, self.shape
        if saved.qkv is None:
            self._attend(saved.s1, None, saved, rows)
            self._gate(saved, rows)
        assert saved.r1 is not None
        assert saved.qkv is not None
        assert saved.lse is not None
        assert saved.x_o is not None
        assert saved.s2 is not None
        assert saved.r2 is not None
        assert saved.gate_up is not None

        # What a layer with adapters had as its input is made again rather than kept, if it is
        # one pass over memory away.
        d_act = self.down.gradient(d_c)
        if self.down.group is not None:
            act = self._input(self.down, saved.gate_up, rows, self._activate)
            self._adapter_gradients(self.down, act, d_act, d_c, rows)
            del act
        d_gate_up = saved.gate_up  # in place
        k.gated_backward(d_act[:, : self.down.columns], saved.gate_up, d_gate_up, shape.activation)
        del d_act
        d_n2 = self.gate_up.gradient(d_gate_up)
        if saved.x_gate_up is not None:
            self._adapter_gradients(self.gate_up, saved.x_gate_up, d_n2, d_gate_up, rows)
        saved.gate_up = saved.x_gate_up = None
        del d_gate_up
        k.rms_norm_backward(
            d_n2[:, : self.gate_up.columns],
            saved.s2,
            saved.r2,
            self.norm2,
            d_stream,
            _out(d_stream, d_c),
        )
        saved.s2 = None
        del d_n2

        d_x_o = self.o.gradient(d_c)
        if self.o.group is not None:
            self._adapter_gradients(self.o, saved.x_o, d_x_o, d_c, rows)
        d_qkv = torch.empty_like(saved.qkv)
        delta = d_qkv.new_empty((shape.heads, len(d_qkv)), dtype=torch.float32)
        k.attention_backward(
            d_x_o[:, : self.o.columns],
            saved.qkv,
            saved.x_o[:, : self.o.columns],
            saved.lse,
            rows.cu_seqlens,
            rows.max_seqlen,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.scale,
            d_qkv,
            delta,
            window=self.window,
        )
        saved.qkv = saved.x_o = saved.lse = None
        del d_x_o
        self._rotate(d_qkv, rows, inverse=True)
        d_n1 = self.qkv.gradient(d_qkv)
        if saved.x_qkv is not None:
            self._adapter_gradients(self.qkv, saved.x_qkv, d_n1, d_qkv, rows)
        k.rms_norm_backward(
            d_n1[:, : self.qkv.columns],
            saved.s1,
            saved.r1,
            self.norm1,
            d_stream,
            _out(d_stream, d_c),
        )

    def _attend(self, stream: Tensor, y: Tensor | None, saved: Saved, rows: Rows) -> None:
        """Up to attention's output; fills ``saved`` from s1 to x_o."""
        k, shape, tokens = self.kernels, self.shape, len(stream)
        r1 = torch.empty(tokens, dtype=torch.float32, device=stream.device)

        def norm(out: Tensor) -> None:
            into = None if y is None else saved.s1
            k.rms_norm(stream, y, self.norm1, shape.eps, into, out, r1)

        x_qkv = self._input(self.qkv, stream, rows, lambda _, out: norm(out))
        qkv = self.qkv.product(x_qkv)
        self._rotate(qkv, rows)
        lse = torch.empty(
            k.attention_lse_shape(tokens, len(rows.cu_seqlens) - 1, rows.max_seqlen, shape.heads),
            dtype=torch.float32,
            device=stream.device,
        )

        def attend(_: Tensor, out: Tensor) -> None:
            k.attention(
                qkv,
                rows.cu_seqlens,
                rows.max_seqlen,
                shape.heads,
                shape.kv_heads,
                shape.head_dim,
                shape.scale,
                out,
                lse,
                window=self.window,
            )

        x_o = self._input(self.o, qkv, rows, attend)
        saved.r1, saved.qkv, saved.lse, saved.x_o = r1, qkv, lse, x_o
        saved.x_qkv = x_qkv if self.qkv.group is not None else None

    def _gate(self, saved: Saved, rows: Rows) -> None:
        """From attention's output to what goes into the activation; fills s2 to gate_up."""
        assert saved.x_o is not None
        s1 = saved.s1
        y_o = self.o.product(saved.x_o)
        s2 = torch.empty_like(s1)
        r2 = torch.empty(len(s1), dtype=torch.float32, device=s1.device)

        def norm(_: Tensor, out: Tensor) -> None:
            self.kernels.rms_norm(s1, y_o, self.norm2, self.shape.eps, s2, out, r2)

        x = self._input(self.gate_up, y_o, rows, norm)
        saved.gate_up = self.gate_up.product(x)
        saved.s2, saved.r2 = s2, r2
        saved.x_gate_up = x if self.gate_up.group is not None else None

    def _input(
        self,
        joined: JoinedLinear,
        source: Tensor,
        rows: Rows,
        write: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        """x' of ``joined``: ``write(source, out)`` fills the first columns, adapters the rest."""
        x = torch.empty(len(source), joined.width, dtype=joined.dtype, device=source.device)
        write(source, x[:, : joined.columns])
        if joined.group is not None:
            self.kernels.lora_down(x, joined.group, rows.keys)
        return x

    def _activate(self, gate_up: Tensor, out: Tensor) -> None:
        self.kernels.gated(gate_up, out, self.shape.activation)

    def _rotate(self, qkv: Tensor, rows: Rows, inverse: bool = False) -> None:
        shape = self.shape
        self.kernels.rope(
            qkv,
            rows.cos,
            rows.sin,
            rows.position_ids,
            shape.heads + shape.kv_heads,
            shape.head_dim,
            inverse=inverse,
        )

    def _adapter_gradients(
        self, joined: JoinedLinear, x: Tensor, d_x: Tensor, d_y: Tensor, rows: Rows
    ) -> None:
        """Add dA and dB where the optimizer has them, and the adapters' part to ``d_x``."""
        assert joined.group is not None
        self.kernels.lora_grads(x, d_x, d_y, joined.group, rows.keys)
        self.kernels.lora_grad_input(d_x, joined.group, rows.keys)


def _out(d_stream: Tensor, d_c: Tensor) -> Tensor | None:
    """Where the stream's gradient goes in the products' type: nowhere if it is in it already."""
    return None if d_c is d_stream else d_c
