"""AdamW on the flat parameters (Loshchilov and Hutter, 2019, arXiv 1711.05101, algorithm 2).

    m ← β₁ m + (1 - β₁) g          v ← β₂ v + (1 - β₂) g²
    p ← (1 - lr·λ) p - lr · (m / (1 - β₁ᵗ)) / (√v / √(1 - β₂ᵗ) + ε)

Rate, clipping factor, step count and whether there is an update at all are tensors on the
device, so that a step never waits for it and can be captured in a CUDA graph. Where there is no
update, nothing changes: not the weights, not the moments, not the step count. The rate of a group
of parameters is its factor times the run's.

With ``use_kernels`` and Triton a step on a GPU is two or three launches
(:mod:`halfbyte.kernels.adamw`); the PyTorch code here is what they are measured by.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from halfbyte.kernels import triton_shim
from halfbyte.kernels.adamw import adamw_32bit_, adamw_scalars_
from halfbyte.optim.flat import FlatParameters, Group
from halfbyte.recipe.schema import TrainingRecipe

# Elements updated at once: what is made on the way fits a CPU's cache, or a few MB of a GPU, where
# each pass also costs a launch.
CHUNK_CPU = 1 << 16
CHUNK_CUDA = 1 << 22


class Moments(Protocol):
    """The running means of g and of g² for a range of the flat parameters."""

    start: int
    stop: int

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """m and v of the elements ``start`` … ``stop`` as fp32 tensors of their own."""
        ...

    def write(self, start: int, stop: int, m: Tensor, v: Tensor, do_update: Tensor) -> None:
        """Keep ``m`` and ``v`` where ``do_update``, else what is there."""
        ...

    def update_parameters(
        self,
        data: Tensor,
        grad: Tensor,
        scalars: Tensor,
        do_update: Tensor,
        *,
        beta1: float,
        beta2: float,
        eps: float,
        shadow: Tensor | None,
    ) -> None:
        """The whole update by a kernel: these moments and their part of ``data``."""
        ...

    def state_tensors(self) -> dict[str, Tensor]: ...


class Moments32:
    """Moments in fp32."""

    def __init__(self, start: int, stop: int, device: torch.device) -> None:
        self.start, self.stop = start, stop
        self.m = torch.zeros(stop - start, device=device)
        self.v = torch.zeros(stop - start, device=device)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        at = slice(start - self.start, stop - self.start)
        return self.m[at].clone(), self.v[at].clone()

    def write(self, start: int, stop: int, m: Tensor, v: Tensor, do_update: Tensor) -> None:
        at = slice(start - self.start, stop - self.start)
        keep(self.m[at], m, do_update)
        keep(self.v[at], v, do_update)

    def update_parameters(
        self,
        data: Tensor,
        grad: Tensor,
        scalars: Tensor,
        do_update: Tensor,
        *,
        beta1: float,
        beta2: float,
        eps: float,
        shadow: Tensor | None,
    ) -> None:
        at = slice(self.start, self.stop)
        adamw_32bit_(
            data[at],
            grad[at],
            self.m,
            self.v,
            scalars,
            do_update,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            shadow=None if shadow is None else shadow[at],
        )

    def state_tensors(self) -> dict[str, Tensor]:
        return {"m": self.m, "v": self.v}


class AdamW:
    """AdamW with 32-bit state; :mod:`halfbyte.optim.adamw_8bit` has other moments.

    ``use_kernels`` allows Triton's kernels on a GPU; without Triton or on a CPU it means nothing.
    ``shadow`` may be set to a tensor [n] of another floating type, which from then on receives the
    parameters of each update, rounded. Until the first update it holds what it was filled with.
    """

    def __init__(
        self, parameters: FlatParameters, training: TrainingRecipe, *, use_kernels: bool = False
    ) -> None:
        self.parameters = parameters
        self.beta1, self.beta2 = training.adam_beta1, training.adam_beta2
        self.eps, self.weight_decay = training.adam_epsilon, training.weight_decay
        self.count = torch.zeros((), dtype=torch.int64, device=parameters.data.device)
        self.moments = self._make_moments()
        on_gpu = parameters.data.device.type == "cuda"
        self.use_kernels = use_kernels and on_gpu and triton_shim.INSTALLED
        self.scalars = torch.zeros(len(self.moments), 4, device=parameters.data.device)
        self.no = torch.zeros((), dtype=torch.bool, device=parameters.data.device)
        self.shadow: Tensor | None = None

    def _make_moments(self) -> list[list[Moments]]:
        """Of each group of the parameters."""
        device = self.parameters.data.device
        return [[Moments32(g.start, g.stop, device)] for g in self.parameters.groups]

    @torch.no_grad()
    def step(self, lr: Tensor, clip_scale: Tensor, do_update: Tensor) -> None:
        """One update from ``parameters.grad`` times ``clip_scale``.

        ``lr`` and ``clip_scale`` are fp32 scalars, ``do_update`` a bool scalar, all on the
        parameters' device.
        """
        if self.use_kernels:
            self._step_by_kernels(lr, clip_scale, do_update)
            return
        self.count += do_update
        # A sound exponent for the step that is thrown away at count 0; corrections in fp64, since
        # 1 - β₂ᵗ cancels three digits at the first step.
        t = self.count.clamp(min=1).double()
        root = torch.sqrt(1.0 - self.beta2**t).float()
        for group, group_moments in zip(self.parameters.groups, self.moments, strict=True):
            rate = self._rate(lr, group).double()
            step_size = (-rate / (1.0 - self.beta1**t)).float()
            decay = (1.0 - rate * self.weight_decay).float() if self.weight_decay > 0.0 else None
            for moments in group_moments:
                self._update(moments, clip_scale, step_size, root, decay, do_update)

    def _update(
        self,
        moments: Moments,
        clip_scale: Tensor,
        step_size: Tensor,
        root: Tensor,
        decay: Tensor | None,
        do_update: Tensor,
    ) -> None:
        data, grad = self.parameters.data, self.parameters.grad
        size = CHUNK_CPU if data.device.type == "cpu" else CHUNK_CUDA
        for start in range(moments.start, moments.stop, size):
            stop = min(start + size, moments.stop)
            g, p = grad[start:stop] * clip_scale, data[start:stop]
            m, v = moments.read(start, stop)
            m.mul_(self.beta1).add_(g, alpha=1.0 - self.beta1)
            v.mul_(self.beta2).addcmul_(g, g, value=1.0 - self.beta2)
            # p + (step_size · m) / denominator, rounded in this order as addcdiv does.
            change = (m * step_size).div_((v.sqrt() / root).add_(self.eps))
            keep(p, change.add_(p if decay is None else p * decay), do_update)
            moments.write(start, stop, m, v, do_update)
            if self.shadow is not None:
                self.shadow[start:stop] = p

    def _step_by_kernels(self, lr: Tensor, clip_scale: Tensor, do_update: Tensor) -> None:
        for i, group in enumerate(self.parameters.groups):
            adamw_scalars_(
                self.count,
                self._rate(lr, group),
                clip_scale,
                do_update if i == 0 else self.no,  # the update is counted once
                self.scalars[i],
                beta1=self.beta1,
                beta2=self.beta2,
                weight_decay=self.weight_decay,
            )
            for moments in self.moments[i]:
                moments.update_parameters(
                    self.parameters.data,
                    self.parameters.grad,
                    self.scalars[i],
                    do_update,
                    beta1=self.beta1,
                    beta2=self.beta2,
                    eps=self.eps,
                    shadow=self.shadow,
                )

    def _rate(self, lr: Tensor, group: Group) -> Tensor:
        return lr if group.rate == 1.0 else lr * group.rate

    def state_tensors(self) -> dict[str, Tensor]:
        """What the next step depends on, by name; views, not copies."""
        found = {"count": self.count}
        for i, group_moments in enumerate(self.moments):
            for moments in group_moments:
                prefix = f"group{i}." if i else ""
                found |= {f"{prefix}{n}": t for n, t in moments.state_tensors().items()}
        return found

    @torch.no_grad()
    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Put back what :meth:`state_tensors` gave, from tensors on any device."""
        for name, tensor in self.state_tensors().items():
            tensor.copy_(state[name])


def keep(old: Tensor, new: Tensor, do_update: Tensor) -> None:
    """``old`` ← ``new`` where ``do_update``."""
    torch.where(do_update, new, old, out=old)
