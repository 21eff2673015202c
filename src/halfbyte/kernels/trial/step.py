"""The kernels of the loss and of the optimizer, tried."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from halfbyte.kernels import adamw
from halfbyte.kernels.choice import Kernel
from halfbyte.kernels.nf4 import dynamic_map
from halfbyte.kernels.trial.base import TOKENS, CaseBase, compare

HEAD_WIDTH = 64  # the head's kernel sees logits, whatever they are made of


class StepCases(CaseBase):
    """See :mod:`halfbyte.model.fused` and :mod:`halfbyte.optim.adamw` for the calls."""

    def head_loss(self) -> None:
        hidden = self.random(TOKENS, HEAD_WIDTH)
        weight = self.random(self.spec.vocabulary, HEAD_WIDTH, share=0.25)
        labels = torch.arange(TOKENS, device=self.device) * 31 % self.spec.vocabulary
        labels[-5:] = -100
        factor = torch.tensor(0.125, device=self.device)

        def run(learned: bool, kernel: Kernel) -> list[Tensor]:
            d_hidden = self.empty_like(hidden) if learned else None
            loss = kernel(
                hidden,
                weight,
                labels,
                factor,
                d_hidden,
                scale=1.0,
                softcap=self.spec.softcap,
                # In two pieces and a rest.
                chunk_bytes=27 * self.spec.vocabulary * hidden.element_size(),
            )
            return [loss.view(1)] if d_hidden is None else [loss.view(1), d_hidden]

        for learned in (True, False):
            self.check("head_loss", partial(run, learned))

    def adamw(self) -> None:
        spec = self.spec
        if spec.moments_8bit:
            self._adamw(8 * adamw.BLOCK, eight_bits=True)
        if spec.parameters_32bit:
            # As many as divide by 16 in the same way.
            self._adamw(min(spec.parameters_32bit, 1024 + spec.parameters_32bit % 16), False)

    def _adamw(self, n: int, eight_bits: bool) -> None:
        """Two updates, each beside the same one in plain PyTorch from the moments before it."""
        spec = self.spec
        beta1, beta2 = spec.betas
        wide = partial(torch.zeros, device=self.device)
        data, count, scalars = (
            self.random(n, dtype=torch.float32),
            wide((), dtype=torch.int64),
            wide(4),
        )
        rate, clip = (
            torch.full((), 1e-3, device=self.device),
            torch.full((), 0.5, device=self.device),
        )
        yes = torch.ones((), dtype=torch.bool, device=self.device)
        maps = [dynamic_map(signed).to(self.device) for signed in (True, False)]
        tables = [adamw.search_table(dynamic_map(s)).to(self.device) for s in (True, False)]
        codes = [wide(n, dtype=torch.uint8) for _ in range(2)]
        absmax = [wide(-(-n // adamw.BLOCK)) for _ in range(2)]
        moments = [wide(n) for _ in range(2)]

        def read() -> list[Tensor]:
            if not eight_bits:
                return [moment.clone() for moment in moments]
            return [
                (values[c.long()].view(-1, adamw.BLOCK) * scale[:, None]).view(-1)
                for values, c, scale in zip(maps, codes, absmax, strict=True)
            ]

        for step in (1, 2):
            grad = self.random(n, dtype=torch.float32)
            m, v = read()
            g = grad * clip
            m, v = m * beta1 + g * (1.0 - beta1), v * beta2 + g * g * (1.0 - beta2)
            change = m / (1.0 - beta1**step) / ((v / (1.0 - beta2**step)).sqrt() + spec.epsilon)
            expected = data * (1.0 - 1e-3 * spec.weight_decay) - 1e-3 * change
            adamw.adamw_scalars_(
                *(count, rate, clip, yes, scalars),
                beta1=beta1,
                beta2=beta2,
                weight_decay=spec.weight_decay,
            )
            eps = spec.epsilon
            if eight_bits:
                adamw.adamw_8bit_(
                    *(data, grad, codes[0], absmax[0], codes[1], absmax[1], scalars, yes),
                    tables[0],
                    tables[1],
                    beta1=beta1,
                    beta2=beta2,
                    eps=eps,
                )
            else:
                adamw.adamw_32bit_(
                    data,
                    grad,
                    moments[0],
                    moments[1],
                    scalars,
                    yes,
                    beta1=beta1,
                    beta2=beta2,
                    eps=eps,
                )
            compare("adamw", data, expected, 1e-4)
            # Codes near a block's largest are some 7 parts in 1,000 of it apart, unsigned and 14.
            for got, moment in zip(read(), (m, v), strict=True):
                compare("a moment of adamw", got, moment, 0.02 if eight_bits else 1e-4)
