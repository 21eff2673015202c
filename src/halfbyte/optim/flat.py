"""All trained parameters as views of one tensor, and their gradients of another.

Zeroing, the norm and the update are then one pass over memory each, whatever the number of
layers. autograd adds in place to a gradient that is there already, so the views last as long as
nobody sets a parameter's ``grad`` to None.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BLOCK = 256  # elements that share a scale in 8-bit optimizer state
MIN_8BIT_SIZE = 4096  # bitsandbytes keeps the state of smaller tensors in fp32


@dataclass(frozen=True)
class Group:
    """Elements ``start`` … ``stop`` of the flat parameters, whose rate is ``rate`` times the run's.

    Those up to ``blocked`` may have state in 8 bits, the others have it in fp32.
    """

    start: int
    blocked: int
    stop: int
    rate: float


@dataclass(frozen=True)
class FlatParameters:
    """``data`` and ``grad`` fp32 [n]; ``names``, ``offsets`` and ``shapes`` in the given order.

    In memory the tensors of one rate lie together, as one of ``groups``. In each those of at least
    4,096 elements come first, each from a multiple of 256 on: so no block of 256 holds elements of
    two tensors. Elements between tensors belong to none, and their gradient is zero.
    """

    data: Tensor
    grad: Tensor
    names: tuple[str, ...]
    offsets: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    groups: tuple[Group, ...]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Each parameter's part of ``flat`` [n], in its shape, by name."""
        return {
            name: flat[offset : offset + shape.numel()].view(shape)
            for name, offset, shape in zip(self.names, self.offsets, self.shapes, strict=True)
        }


def flatten_parameters(
    named: Mapping[str, nn.Parameter],
    *,
    rates: Mapping[str, float] | None = None,
    full_state: Collection[str] = (),
) -> FlatParameters:
    """Move ``named`` fp32 parameters, all on one device, into one tensor, values unchanged.

    ``rates`` are factors of the learning rate, 1 where nothing is said; the state of those in
    ``full_state`` stays in fp32 whatever their size. The parameters stay the objects they were.
    Raises ValueError for another type than fp32.
    """
    for name, parameter in named.items():
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype}; trained parameters are fp32")
    offsets: dict[str, int] = {}
    groups = []
    end = 0
    factors = {name: (rates or {}).get(name, 1.0) for name in named}
    for rate in dict.fromkeys(sorted(factors.values())):
        inside = {name: p for name, p in named.items() if factors[name] == rate}
        start = end
        for name, parameter in inside.items():
            if parameter.numel() >= MIN_8BIT_SIZE and name not in full_state:
                offsets[name] = end
                end += _whole_blocks(parameter.numel())
        blocked = end
        for name, parameter in inside.items():
            if name not in offsets:
                offsets[name] = end
                end += parameter.numel()
        groups.append(Group(start, blocked, end, rate))
        if len(inside) < len(named):
            end = _whole_blocks(end)

    device = next(iter(named.values())).device
    flat = FlatParameters(
        data=torch.zeros(end, device=device),
        grad=torch.zeros(end, device=device),
        names=tuple(named),
        offsets=tuple(offsets[name] for name in named),
        shapes=tuple(parameter.shape for parameter in named.values()),
        groups=tuple(groups),
    )
    data, grad = flat.views(flat.data), flat.views(flat.grad)
    for name, parameter in named.items():
        data[name].copy_(parameter.detach())
        parameter.data = data[name]
        parameter.grad = grad[name]
    return flat


def _whole_blocks(elements: int) -> int:
    return -(-elements // BLOCK) * BLOCK
