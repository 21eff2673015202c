"""The kernels of a layer but for its adapters, tried: norms, rotation, activation, attention."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from halfbyte.kernels import attention
from halfbyte.kernels.choice import PLAIN, Kernel
from halfbyte.kernels.trial.base import MOST_TOKENS, TOKENS, CaseBase
from halfbyte.kernels.trial.spec import BatchShape

ROW = 300  # tokens of a row that attention is tried on: more than two of its tiles
WIDEST_TILE = 128  # tokens of attention's


class LayerCases(CaseBase):
    """See :mod:`halfbyte.model.fused_layer` for how each kernel is called."""

    def rms_norm(self) -> None:
        first = self.widths("qkv")
        for width in first:
            self.check("rms_norm", partial(self._norm, False, width, *self._norm_inputs()))
        for width in dict.fromkeys([*first, *self.widths("gate_up"), self.spec.hidden]):
            self.check("rms_norm", partial(self._norm, True, width, *self._norm_inputs()))

    def _norm_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        h = self.spec.hidden
        return (
            self.random(TOKENS, h, dtype=self.stream),
            self.random(TOKENS, h),
            self.random(h, dtype=self.stream),
        )

    def _norm(
        self, summed: bool, width: int, x: Tensor, y: Tensor, weight: Tensor, kernel: Kernel
    ) -> list[Tensor]:
        stream, out = self.empty_like(x), self.empty(TOKENS, width)[:, : self.spec.hidden]
        rstd = self.empty(TOKENS, dtype=torch.float32)
        kernel(x, y if summed else None, weight, 1e-5, stream if summed else None, out, rstd)
        return [out, rstd, stream] if summed else [out, rstd]

    def rms_norm_backward(self) -> None:
        widths = [self.spec.hidden, *self.widths("qkv"), *self.widths("gate_up")]
        x, _, weight = self._norm_inputs()
        before, rstd = self.random(TOKENS, self.spec.hidden, dtype=self.stream), self._rstd(x)
        for width in dict.fromkeys(widths):
            d_out = self.random(TOKENS, width)[:, : self.spec.hidden]
            first = (True, False) if width == self.spec.hidden else (False,)
            for begins in first:
                run = partial(self._norm_backward, begins, d_out, x, rstd, weight, before)
                self.check("rms_norm_backward", run)

    def _norm_backward(
        self,
        first: bool,
        d_out: Tensor,
        x: Tensor,
        rstd: Tensor,
        weight: Tensor,
        before: Tensor,
        kernel: Kernel,
    ) -> list[Tensor]:
        d_stream = before.clone()
        apart = self.stream != self.dtype
        d_c = self.empty(TOKENS, self.spec.hidden) if apart else None
        kernel(d_out, x, rstd, weight, d_stream, d_c, first=first)
        return [d_stream] if d_c is None else [d_stream, d_c]

    def _rstd(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x.float().square().mean(dim=1) + 1e-5)

    def rope(self) -> None:
        spec = self.spec
        heads, half = spec.heads + spec.kv_heads, spec.head_dim // 2
        angles = self.random(2 * TOKENS, half, dtype=torch.float32)
        cos, sin = angles.cos(), angles.sin()
        places = torch.arange(TOKENS, device=self.device) * 2 % (2 * TOKENS)
        qkv = self.random(TOKENS, (heads + spec.kv_heads) * spec.head_dim)

        def run(inverse: bool, kernel: Kernel) -> list[Tensor]:
            turned = qkv.clone()
            kernel(turned, cos, sin, places, heads, spec.head_dim, inverse=inverse)
            return [turned]

        for inverse in (False, True):
            self.check("rope", partial(run, inverse))

    def gated(self) -> None:
        width = self.spec.intermediate
        gate_up = self.random(TOKENS, 2 * width)

        def run(columns: int, kernel: Kernel) -> list[Tensor]:
            out = self.empty(TOKENS, columns)[:, :width]
            kernel(gate_up, out, self.spec.activation)
            return [out]

        for columns in self.widths("down"):
            self.check("gated", partial(run, columns))

    def gated_backward(self) -> None:
        width = self.spec.intermediate
        gate_up = self.random(TOKENS, 2 * width)

        def run(d_act: Tensor, kernel: Kernel) -> list[Tensor]:
            d_gate_up = gate_up.clone()
            kernel(d_act[:, :width], d_gate_up, d_gate_up, self.spec.activation)
            return [d_gate_up]

        for columns in self.widths("down"):
            self.check("gated_backward", partial(run, self.random(TOKENS, columns)))

    def attention(self) -> None:
        for batch in (*self.spec.batches, *self.spec.evaluated):
            for window in self.spec.windows:
                for width in self.widths("o"):
                    self.check("attention", partial(self._attend, self._rows(batch), window, width))

    def attention_backward(self) -> None:
        for batch in self.spec.batches:
            for window in self.spec.windows:
                for width in self.widths("o"):
                    rows = self._rows(batch)
                    run = partial(self._attend_backward, rows, window, width)
                    self.check("attention_backward", run)

    def _rows(self, batch: BatchShape) -> tuple[Tensor, Tensor, int, int]:
        """(qkv, cu_seqlens, max_seqlen, tokens in rows) as ``batch`` has them.

        There are rows in the first tokens alone; the programs of the others find nothing to do.
        """
        spec = self.spec
        # With more tiles than this no group of heads is divided among programs.
        most = max(MOST_TOKENS, WIDEST_TILE * -(-attention.ENOUGH_PROGRAMS // spec.kv_heads))
        tokens = min(batch.tokens, most)
        first = min(ROW, batch.max_seqlen, tokens)
        second = min(37, batch.max_seqlen, tokens - first) if batch.rows > 1 else 0
        borders = [0, first] + [first + second] * (batch.rows - 1)
        cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=self.device)
        qkv = self.random(tokens, (spec.heads + 2 * spec.kv_heads) * spec.head_dim)
        return qkv, cu_seqlens, batch.max_seqlen, first + second

    def _attend(
        self,
        rows: tuple[Tensor, Tensor, int, int],
        window: int | None,
        width: int,
        kernel: Kernel,
    ) -> list[Tensor]:
        qkv, cu_seqlens, max_seqlen, used = rows
        out, _ = self._attended(kernel, qkv, cu_seqlens, max_seqlen, window, width)
        return [out[:used]]

    def _attended(
        self,
        kernel: Kernel,
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        window: int | None,
        width: int,
    ) -> tuple[Tensor, Tensor]:
        """Attention's output, as wide as its values in rows of ``width``, and the log-sums."""
        plain = kernel is PLAIN.attention
        lse_shape = (PLAIN if plain else self.kernels).attention_lse_shape
        spec, tokens = self.spec, len(qkv)
        out = self.empty(tokens, width)[:, : spec.heads * spec.head_dim]
        shape = lse_shape(tokens, len(cu_seqlens) - 1, max_seqlen, spec.heads)
        lse = self.empty(*shape, dtype=torch.float32)
        kernel(qkv, cu_seqlens, max_seqlen, *self._heads(), out, lse, window=window)
        return out, lse

    def _heads(self) -> tuple[int, int, int, float]:
        spec = self.spec
        return spec.heads, spec.kv_heads, spec.head_dim, spec.head_dim**-0.5

    def _attend_backward(
        self,
        rows: tuple[Tensor, Tensor, int, int],
        window: int | None,
        width: int,
        kernel: Kernel,
    ) -> list[Tensor]:
        qkv, cu_seqlens, max_seqlen, used = rows
        # The reference's output serves both, unless log-sums have a shape of their own.
        same = self.kernels.attention_lse_shape is PLAIN.attention_lse_shape
        plain = same or kernel is PLAIN.attention_backward
        forward = PLAIN.attention if plain else self.kernels.attention
        out, lse = self._attended(forward, qkv, cu_seqlens, max_seqlen, window, width)
        out[used:] = 0.0
        generator = torch.Generator(self.device).manual_seed(11)
        d_out = torch.randn(len(qkv), width, generator=generator, device=self.device)
        d_out = d_out.to(self.dtype)[:, : out.shape[1]]
        d_qkv = self.empty_like(qkv)
        delta = self.empty(self.spec.heads, len(qkv), dtype=torch.float32)
        kernel(
            *(d_out, qkv, out, lse, cu_seqlens, max_seqlen, *self._heads(), d_qkv, delta),
            window=window,
        )
        return [d_qkv[:used]]
