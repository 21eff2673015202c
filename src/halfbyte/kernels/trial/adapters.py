"""The kernels of quantized and adapted weights, tried."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from halfbyte.kernels.choice import PLAIN, Kernel
from halfbyte.kernels.dropout import apply_dropout_reference
from halfbyte.kernels.lora_group import LoraGroup, LoraPart, make_fold, part_table
from halfbyte.kernels.nf4 import SCALES_PER_BLOCK
from halfbyte.kernels.trial.base import (
    TOKENS,
    TOLERANCE,
    CaseBase,
    WrongResultError,
    compare,
    lengths,
)
from halfbyte.kernels.trial.spec import GroupShape


class AdapterCases(CaseBase):
    """See :mod:`halfbyte.quant.joined` for how each kernel is called."""

    def lora_down(self, group: GroupShape) -> None:
        lora = self._group(group)

        def run(x: Tensor, keys: Tensor | None, kernel: Kernel) -> list[Tensor]:
            changed = x.clone()
            kernel(changed, lora, keys)
            return [changed[:, group.columns :]]

        ways = [(self.spec.batches, self._keys(group)), (self.spec.evaluated, None)]
        for batches, keys in ways:
            for tokens in lengths(batches):
                x = self.random(tokens, group.columns + group.extra)
                self.check("lora_down", partial(run, x, keys))

    def lora_grad_input(self, group: GroupShape) -> None:
        lora, keys = self._group(group), self._keys(group)

        def run(d_x: Tensor, kernel: Kernel) -> list[Tensor]:
            changed = d_x.clone()
            kernel(changed, lora, keys)
            return [changed[:, : group.columns]]

        for tokens in lengths(self.spec.batches):
            d_x = self.random(tokens, group.columns + group.extra)
            self.check("lora_grad_input", partial(run, d_x))

    def lora_grads(self, group: GroupShape) -> None:
        lora, keys = self._group(group), self._keys(group)

        def run(x: Tensor, d_x: Tensor, d_y: Tensor, kernel: Kernel) -> list[Tensor]:
            changed = replace(lora, grad=lora.grad.clone())
            kernel(x, d_x, d_y, changed, keys)
            return [view for part in lora.parts for view in changed.views(changed.grad, part)]

        for tokens in lengths(self.spec.batches):
            x, d_x = (self.random(tokens, group.columns + group.extra) for _ in range(2))
            d_y = self.random(tokens, sum(group.rows))
            self.check("lora_grads", partial(run, x, d_x, d_y))

    def fold_b(self) -> None:
        groups = [group for group in self.spec.groups if group.adapted]
        loras = [self._group(group) for group in groups]

        def run(kernel: Kernel) -> list[Tensor]:
            weights = [
                torch.zeros(
                    *(sum(group.rows), group.columns + group.extra),
                    dtype=self.dtype,
                    device=self.device,
                )
                for group in groups
            ]
            for lora, weight in zip(loras, weights, strict=True):
                kernel(make_fold([(lora, weight)]))
            return weights

        self.check("fold_b", run)

    def dequantize(self) -> None:
        for columns, width in dict.fromkeys(
            (group.columns, group.columns + group.extra) for group in self.spec.groups
        ):
            self.check("dequantize", partial(self._dequantize, columns, width))

    def _dequantize(self, columns: int, width: int, kernel: Kernel) -> list[Tensor]:
        spec, rows = self.spec, 64
        generator = torch.Generator(self.device).manual_seed(13)
        blocks = rows * columns // spec.block_size
        codes, quantized = (
            torch.randint(256, (n,), generator=generator, dtype=torch.uint8, device=self.device)
            for n in (rows * columns // 2, blocks)
        )
        nested = offsets = None
        absmax = quantized.float() / 256
        if spec.double_quantization:
            absmax = quantized
            count = -(-blocks // SCALES_PER_BLOCK)
            nested = torch.rand(count, generator=generator, device=self.device)
            offsets = torch.rand(1, generator=generator, device=self.device)
        out = self.empty(rows, width)
        kernel(codes, absmax, nested, offsets, (0,), spec.block_size, rows, columns, out)
        return [out[:, :columns]]

    def dropout_keys(self) -> None:
        position = torch.tensor([5, 3], device=self.device)

        def run(kernel: Kernel) -> list[Tensor]:
            keys = torch.zeros(self.spec.modules, 2, dtype=torch.int32, device=self.device)
            kernel(42, position, keys)
            return [keys]

        got, expected = run(self.kernels.dropout_keys)[0], run(PLAIN.dropout_keys)[0]
        if not torch.equal(got, expected):
            raise WrongResultError("dropout_keys makes other keys")

    def apply_dropout(self) -> None:
        assert self.kernels.apply_dropout is not None
        key = torch.tensor([-1640531535, 97], dtype=torch.int32, device=self.device)
        for columns in dict.fromkeys(group.columns for group in self.spec.groups):
            x, before = self.random(TOKENS, columns), self.random(TOKENS, columns)
            for accumulate in (False, True):
                outs = [before.clone(), before.clone()]
                for apply, out in zip(
                    (self.kernels.apply_dropout, apply_dropout_reference), outs, strict=True
                ):
                    apply(x, key, self.spec.dropout, out, accumulate=accumulate)
                compare("apply_dropout", outs[0], outs[1], TOLERANCE[self.dtype])

    def _group(self, group: GroupShape) -> LoraGroup:
        """The adapters of ``group``, alone in their flat parameters."""
        spec, at = self.spec, 0
        parts = []
        for number, layer in enumerate(group.adapted):
            b = at + spec.rank * group.columns
            first = sum(group.rows[:layer])
            parts.append(LoraPart(at, b, first, group.rows[layer], number))
            at = b + group.rows[layer] * spec.rank
        values = self.random(at, dtype=torch.float32, share=0.1)
        return LoraGroup(
            parts=tuple(parts),
            table=part_table(parts, self.device),
            values=values,
            shadow=values.to(self.dtype),
            grad=self.random(at, dtype=torch.float32),
            columns=group.columns,
            extra=group.extra,
            r=spec.rank,
            scale=spec.scale,
            p=spec.dropout,
        )

    def _keys(self, group: GroupShape) -> Tensor:
        keys = torch.zeros(len(group.adapted), 2, dtype=torch.int32, device=self.device)
        PLAIN.dropout_keys(42, torch.tensor([1, 0]), keys)
        return keys
