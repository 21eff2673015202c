"""AdamW whose moments are kept in 8 bits (Dettmers et al., 2021, arXiv 2110.02861).

A block of 256 moments shares one scale, its largest magnitude; each is stored as the index of a
value near to moment / scale in a dynamic map, signed for m and unsigned for v. The update itself
is made in fp32 from the moments before they are quantized again. Tensors of fewer than 4,096
elements keep fp32 moments. All of it is as in bitsandbytes, whose rounding depends on the device:

- on a CPU it looks codes up in a table over 65,536 values evenly spaced on [-1, 1], so what is
  nearer to 0 than 1.5e-5 of its block's largest is not told apart, and 0 itself becomes 2.1e-5
  of it in m and 1.6e-5 in v;
- on a GPU it takes the nearest code, and where a negative m would become 0, the code below.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from halfbyte.kernels import triton_shim
from halfbyte.kernels.adamw import adamw_8bit_, search_table
from halfbyte.kernels.nf4 import dynamic_map
from halfbyte.optim.adamw import AdamW, Moments, Moments32, keep
from halfbyte.optim.flat import BLOCK, FlatParameters
from halfbyte.recipe.schema import TrainingRecipe

_GRID = 65536


@cache
def _map(signed: bool, device: torch.device) -> Tensor:
    return dynamic_map(signed).to(device)


@cache
def _borders(signed: bool, device: torch.device) -> Tensor:
    book = _map(signed, device)
    return (book[:-1] + book[1:]) / 2


@cache
def _search_table(signed: bool, device: torch.device) -> Tensor:
    return search_table(dynamic_map(signed)).to(device)


@cache
def _grid_codes(signed: bool) -> Tensor:
    """uint8 [65536]: the code of each value of the CPU's grid."""
    grid = torch.arange(_GRID, dtype=torch.float32) * 2.0 / (_GRID - 1) - 1.0
    return torch.bucketize(grid, _borders(signed, grid.device)).to(torch.uint8)


def dequantize_moments(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """codes uint8 [n], absmax fp32 [n / 256] → fp32 [n]."""
    values = _map(signed, codes.device).index_select(0, codes.int())
    return values.view(-1, BLOCK).mul_(absmax[:, None]).view(-1)


def quantize_moments(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """fp32 [n], n a multiple of 256 → codes uint8 [n], absmax fp32 [n / 256]."""
    blocks = values.view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    if values.device.type == "cpu":
        scaled = blocks * (1.0 / absmax)[:, None]
        # A block of zeros is 0 · ∞; its codes are 0 by convention, and mean 0 with its scale.
        at = scaled.add_(1.0).mul_((_GRID - 1) / 2).add_(0.5).nan_to_num_(nan=0.0)
        at.clamp_(0, _GRID - 1)  # 1 / absmax is infinite for a subnormal scale
        codes = _grid_codes(signed).index_select(0, at.int().view(-1))
        return codes, absmax
    scaled = (blocks / absmax[:, None]).nan_to_num_(nan=0.0).view(-1)
    index = torch.bucketize(scaled, _borders(signed, values.device), out_int32=True)
    if signed:
        zero = _map(signed, values.device)[index] == 0.0
        index -= (zero & (values < 0.0)).int()
    return index.to(torch.uint8), absmax


class Moments8:
    """Moments in 8 bits for a range of whole blocks."""

    def __init__(self, start: int, stop: int, device: torch.device, paged: bool = False) -> None:
        """``paged`` keeps the codes in pinned main memory, where a GPU's kernel reads and writes
        them over the bus; the scales, a sixty-fourth of them, stay on the device."""
        self.start, self.stop = start, stop
        n = stop - start
        place = {"pin_memory": True} if paged else {"device": device}
        self.codes_m = torch.zeros(n, dtype=torch.uint8, **place)
        self.codes_v = torch.zeros(n, dtype=torch.uint8, **place)
        self.absmax_m = torch.zeros(n // BLOCK, device=device)
        self.absmax_v = torch.zeros(n // BLOCK, device=device)
        for signed in (True, False):  # now: a graph that is captured later cannot copy them over
            _borders(signed, device)
            _search_table(signed, device)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        at, blocks = self._places(start, stop)
        return (
            dequantize_moments(self.codes_m[at], self.absmax_m[blocks], signed=True),
            dequantize_moments(self.codes_v[at], self.absmax_v[blocks], signed=False),
        )

    def write(self, start: int, stop: int, m: Tensor, v: Tensor, do_update: Tensor) -> None:
        at, blocks = self._places(start, stop)
        for values, signed, codes, absmax in (
            (m, True, self.codes_m, self.absmax_m),
            (v, False, self.codes_v, self.absmax_v),
        ):
            new_codes, new_absmax = quantize_moments(values, signed)
            keep(codes[at], new_codes, do_update)
            keep(absmax[blocks], new_absmax, do_update)

    def _places(self, start: int, stop: int) -> tuple[slice, slice]:
        first, last = start - self.start, stop - self.start
        return slice(first, last), slice(first // BLOCK, last // BLOCK)

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
        adamw_8bit_(
            data[at],
            grad[at],
            self.codes_m,
            self.absmax_m,
            self.codes_v,
            self.absmax_v,
            scalars,
            do_update,
            _search_table(True, data.device),
            _search_table(False, data.device),
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            shadow=None if shadow is None else shadow[at],
        )

    def state_tensors(self) -> dict[str, Tensor]:
        return {
            "codes_m": self.codes_m,
            "codes_v": self.codes_v,
            "absmax_m": self.absmax_m,
            "absmax_v": self.absmax_v,
        }


class AdamW8bit(AdamW):
    """AdamW with 8-bit moments where bitsandbytes has them, 32-bit ones elsewhere.

    With ``paged`` the 8-bit moments lie in main memory, where only kernels can read them.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        training: TrainingRecipe,
        *,
        use_kernels: bool = False,
        paged: bool = False,
    ) -> None:
        on_gpu = parameters.data.device.type == "cuda"
        self.paged = paged and use_kernels and on_gpu and triton_shim.INSTALLED
        super().__init__(parameters, training, use_kernels=use_kernels)

    def _make_moments(self) -> list[list[Moments]]:
        device = self.parameters.data.device
        made: list[list[Moments]] = []
        for group in self.parameters.groups:
            found: list[Moments] = []
            if group.blocked > group.start:
                found.append(Moments8(group.start, group.blocked, device, self.paged))
            if group.stop > group.blocked:
                found.append(Moments32(group.blocked, group.stop, device))
            made.append(found)
        return made
