"""Linear layers that share their input, as one weight with their adapters folded in.

    y = x' W'ᵀ + b,    x' = [x | u_1 … u_n],    W' = [W | diag(s B_i)]

W has the rows of all layers end to end (q, k and v; gate and up), u_i = drop_i(x) A_iᵀ. One product
forward and one backward then serve the base and the adapters alike; :mod:`kernels.lora_group` has
what is left. W' is kept, or made in scratch memory for as long as it is needed: the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.choice import Kernels
from halfbyte.kernels.lora_group import Fold, LoraGroup, LoraPart, make_fold, part_table
from halfbyte.kernels.nf4 import SCALES_PER_BLOCK
from halfbyte.quant.linear import QLoRALinear
from halfbyte.quant.nf4 import NF4Weight

# The columns of a weight are brought to a multiple of the first where its input's are one, else of
# the second (rows then begin at multiples of 16 bytes). At 768 and 896 tokens an H100's products of
# 2,048 + 16 columns took 14 and 18 µs backward, of 2,048 + 128 columns 12 and 15.
_TILE, _ALIGNED = 128, 8


def extra_columns(columns: int, adapted: int, r: int) -> int:
    """Columns that ``adapted`` adapters of rank ``r`` add to a joined weight of so many."""
    multiple = _TILE if columns % _TILE == 0 else _ALIGNED
    return -(-adapted * r // multiple) * multiple


class Scratch:
    """Memory for one W' at a time, shared by the layers of a model that have the same shape."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.zeros(rows, columns, dtype=dtype, device=device)
        self.owner: JoinedLinear | None = None


@dataclass(frozen=True)
class FlatAdapter:
    """All adapters of a model, as the optimizer has them.

    ``values`` and ``grad`` fp32 [n], ``shadow`` the values in the products' type; ``offsets`` says
    where a layer's A and B begin, by the layer.
    """

    values: Tensor
    grad: Tensor
    shadow: Tensor
    offsets: Mapping[QLoRALinear, tuple[int, int]]


class JoinedLinear:
    """``layers`` with the same input as one product.

    Their NF4 codes are moved end to end, if they are not loaded so, and ``layer.base`` becomes a
    view of its part: nothing is stored twice and each layer works by itself as before.
    """

    def __init__(self, layers: Sequence[QLoRALinear], kernels: Kernels) -> None:
        first = layers[0]
        self.layers = tuple(layers)
        self.kernels = kernels
        self.columns = first.in_features
        self.rows = sum(layer.out_features for layer in layers)
        self.dtype = first.compute_dtype
        self.device = first.base.device
        self.bias = _joined_bias(layers)
        adapted = [layer for layer in layers if layer.lora_A is not None]
        rank = 0 if not adapted else len(adapted[0].lora_A)  # type: ignore[arg-type]
        self.extra = extra_columns(self.columns, len(adapted), rank)
        self._pieces = _join(layers)
        # "cublas" or "cublaslt" by number of tokens and direction (backward), where it was chosen.
        self.libraries: dict[tuple[int, bool], str] = {}
        self.group: LoraGroup | None = None
        self.kept: Tensor | None = None
        self.scratch: Scratch | None = None
        self._scratch_fold: Fold | None = None

    @property
    def width(self) -> int:
        """Columns of W' and of x'."""
        return self.columns + self.extra

    def attach(self, adapter: FlatAdapter) -> None:
        """Take the adapters from the flat parameters."""
        adapted = [layer for layer in self.layers if layer.lora_A is not None]
        if not adapted:
            return
        starts = dict(zip(self.layers, _row_starts(self.layers), strict=True))
        parts = tuple(
            LoraPart(*adapter.offsets[layer], starts[layer], layer.out_features, layer.number)
            for layer in adapted
        )
        first = adapted[0]
        assert first.lora_A is not None
        self.group = LoraGroup(
            parts=parts,
            table=part_table(parts, self.device),
            values=adapter.values,
            shadow=adapter.shadow,
            grad=adapter.grad,
            columns=self.columns,
            extra=self.extra,
            r=len(first.lora_A),
            scale=first.scale,
            p=first.dropout_p,
        )
        if self.scratch is not None:
            self._scratch_fold = make_fold([(self.group, self.scratch.weight)])

    def use_scratch(self, scratch: Scratch) -> None:
        """Make W' in ``scratch`` when it is wanted."""
        self.scratch = scratch

    def keep(self) -> int:
        """Make W' once and keep it; returns its bytes. B's columns are filled by a fold."""
        self.kept = torch.zeros(self.rows, self.width, dtype=self.dtype, device=self.device)
        self._dequantize(self.kept)
        for layer, start in zip(self.layers, _row_starts(self.layers), strict=True):
            layer.dense = self.kept[start : start + layer.out_features, : self.columns]
        return self.kept.nbytes

    def weight(self) -> Tensor:
        """W' [rows, columns + extra].

        In scratch memory it holds until another layer asks for its own.
        """
        if self.kept is not None:
            return self.kept
        scratch = self.scratch
        assert scratch is not None, "neither kept nor with scratch memory"
        if scratch.owner is not self:
            self._dequantize(scratch.weight)
            if self._scratch_fold is not None:
                self.kernels.fold_b(self._scratch_fold)
            scratch.owner = self
        return scratch.weight

    @property
    def weight_memory(self) -> Tensor:
        """Where :meth:`weight` lies, whatever is in it now."""
        if self.kept is not None:
            return self.kept
        assert self.scratch is not None
        return self.scratch.weight

    def product(self, x: Tensor) -> Tensor:
        """x' [T, columns + extra] → y [T, rows]."""
        weight = self.weight().t()
        with use_library(self.libraries.get((len(x), False))):
            return torch.mm(x, weight) if self.bias is None else torch.addmm(self.bias, x, weight)

    def gradient(self, d_y: Tensor) -> Tensor:
        """dy [T, rows] → [dx₀ | g_1 … g_n], [T, columns + extra]."""
        weight = self.weight()
        with use_library(self.libraries.get((len(d_y), True))):
            return torch.mm(d_y, weight)

    def _dequantize(self, out: Tensor) -> None:
        for piece in self._pieces:
            rows = out[piece.first_row : piece.first_row + piece.rows]
            self.kernels.dequantize(
                piece.codes,
                piece.absmax,
                piece.nested,
                piece.offsets,
                piece.part_blocks,
                piece.block_size,
                piece.rows,
                self.columns,
                rows,
            )


@contextmanager
def use_library(name: str | None) -> Iterator[None]:
    """Have a GPU's products made by the library of that name; None leaves it as it is."""
    if name is None:
        yield
        return
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(name)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


@dataclass(frozen=True)
class _Piece:
    """NF4 matrices end to end that one launch dequantizes."""

    codes: Tensor
    absmax: Tensor
    nested: Tensor | None
    offsets: Tensor | None
    part_blocks: tuple[int, ...]
    block_size: int
    first_row: int
    rows: int


def _row_starts(layers: Sequence[QLoRALinear]) -> list[int]:
    starts, at = [], 0
    for layer in layers:
        starts.append(at)
        at += layer.out_features
    return starts


def _join(layers: Sequence[QLoRALinear]) -> list[_Piece]:
    """One piece of all layers where their scales can lie end to end, else one for each."""
    bases = [_in_nf4(layer) for layer in layers]
    blocks = [base.absmax.numel() for base in bases]
    # Double quantization shares a scale among 256 blocks, which must be of one matrix.
    aligned = bases[0].nested is None or all(n % SCALES_PER_BLOCK == 0 for n in blocks[:-1])
    if not aligned or len(layers) == 1:
        starts = _row_starts(layers)
        return [
            _piece([base], start, layer.out_features)
            for base, layer, start in zip(bases, layers, starts, strict=True)
        ]
    joined = _piece(bases, 0, sum(layer.out_features for layer in layers))
    code, block, scale = 0, 0, 0
    for i, (layer, base) in enumerate(zip(layers, bases, strict=True)):
        codes, scales = base.codes.numel(), base.absmax.numel()
        nested = None if base.nested is None else base.nested.numel()
        layer.base = NF4Weight(
            codes=joined.codes[code : code + codes],
            absmax=joined.absmax[block : block + scales],
            shape=base.shape,
            block_size=base.block_size,
            nested=None if nested is None else joined.nested[scale : scale + nested],  # type: ignore[index]
            offset=None if nested is None else joined.offsets[i],  # type: ignore[index]
        )
        code, block, scale = code + codes, block + scales, scale + (nested or 0)
    return [joined]


def _in_nf4(layer: QLoRALinear) -> NF4Weight:
    assert isinstance(layer.base, NF4Weight), "what a checkpoint leaves in 16 bits is not joined"
    return layer.base


def _piece(bases: Sequence[NF4Weight], first_row: int, rows: int) -> _Piece:
    starts, at = [], 0
    for base in bases:
        starts.append(at)
        at += base.absmax.numel()
    nested = [base.nested for base in bases if base.nested is not None]
    offsets = [base.offset for base in bases if base.offset is not None]
    return _Piece(
        codes=_end_to_end([base.codes for base in bases]),
        absmax=_end_to_end([base.absmax for base in bases]),
        nested=torch.cat(nested) if nested else None,
        offsets=torch.stack(offsets) if offsets else None,
        part_blocks=tuple(starts),
        block_size=bases[0].block_size,
        first_row=first_row,
        rows=rows,
    )


def _joined_bias(layers: Sequence[QLoRALinear]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat(
        [
            torch.zeros(layer.out_features, dtype=layer.compute_dtype, device=layer.base.device)
            if layer.bias is None
            else layer.bias
            for layer in layers
        ]
    )


def _end_to_end(parts: Sequence[Tensor]) -> Tensor:
    """``parts`` as one tensor: where they lie, if that is one after another, else copied."""
    first, at = parts[0], parts[0].storage_offset()
    memory = first.untyped_storage()
    for part in parts:
        if part.untyped_storage().data_ptr() != memory.data_ptr() or part.storage_offset() != at:
            return torch.cat(list(parts))
        at += part.numel()
    return first.as_strided((at - first.storage_offset(),), (1,))
