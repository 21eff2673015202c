"""A model as a GGUF file, written a tensor at a time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from halfbyte.errors import ModelError
from halfbyte.export.gguf.architecture import Architecture, rope_tensor_name
from halfbyte.export.gguf.types import WeightType
from halfbyte.export.gguf.vocabulary import Vocabulary
from halfbyte.model.skeleton import build_skeleton

_Kind = GGMLQuantizationType
_ENDS = ("token_embd.weight", "output.weight")
# Files of before 2023 have 1, whose blocks are others.
_QUANTIZATION_VERSION = 2
_PROBES = 4


class Weights(Protocol):
    """Tensors by transformers' parameter name."""

    def names(self) -> list[str]: ...

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """On the CPU in ``dtype``."""
        ...


@dataclass(frozen=True)
class Described:
    """What the file says of where it comes from."""

    name: str
    base: str | None  # the base model's name
    licence: str | None
    by: str  # who quantized it

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        writer.add_name(self.name)
        if self.licence:
            writer.add_license(self.licence)
        if self.base:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, self.base)
        writer.add_quantized_by(self.by)


@dataclass(frozen=True)
class Written:
    """``tensors``: how many are of each type; ``kept``: those whose rows fit no block of theirs.

    ``probes`` are what each tensor made of a few random vectors before it was written, by
    transformers' name, for comparing it with what is read again.
    """

    tensors: dict[str, int]
    kept: tuple[str, ...]
    probes: dict[str, Tensor]

    def by_llama_cpp(self, path: Path) -> Written:
        """The same weights in the types that llama.cpp has chosen in the file ``path``."""
        kinds = (tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(path).tensors)
        return Written(dict(Counter(kinds)), (), self.probes)


def probe(values: Tensor) -> Tensor:
    """``values`` [rows, columns] (fp32) times vectors of chance, [rows, 4]; a vector itself."""
    if values.dim() < 2:
        return values.clone()
    draw = torch.Generator().manual_seed(values.shape[1])
    return values @ torch.randn(values.shape[1], _PROBES, generator=draw)


def write_model(
    path: Path,
    weights: Weights,
    architecture: Architecture,
    vocabulary: Vocabulary,
    *,
    type: WeightType,
    described: Described,
    chat_template: str | None,
    each: Callable[[int, int], None] = lambda done, of: None,
) -> Written:
    """Write ``path``, which is no file yet, and hand it to the disk.

    Matrices are written in ``type``, embedding and head in Q8_0 where it has 4 or 5 bits, norms
    and biases in fp32. A matrix whose rows are no whole number of blocks is written in fp16. One
    tensor is in memory at a time. ``each`` is told of every tensor that is done. Raises ModelError
    for a weight that is not a finite number in the type, OSError where the disk is full.
    """
    tensors = architecture.tensors(weights.names(), described.name)
    divisors = architecture.rope_divisors()
    kinds, shapes = _planned(architecture, tensors, type, described.name)
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_type("model")
    described.add_to(writer)
    architecture.add_settings(writer)
    vocabulary.add_to(writer, chat_template)
    writer.add_file_type(int(type.number))
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    if divisors is not None:
        _announce(writer, rope_tensor_name(), tuple(divisors.shape), _Kind.F32)
    for name, kind in kinds.items():
        _announce(writer, name, shapes[name], kind)
    probes: dict[str, Tensor] = {}
    writer.write_header_to_file(path)
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors is not None:
            writer.write_tensor_data(divisors.numpy())
        for number, (name, kind) in enumerate(kinds.items(), 1):
            values = weights.read(tensors[name], torch.float32)
            probes[tensors[name]] = probe(values)
            values = architecture.as_stored(name, values)
            writer.write_tensor_data(_in_type(values, kind, tensors[name], shapes[name]))
            each(number, len(kinds))
        assert writer.fout is not None
        for file in writer.fout:
            file.flush()
            os.fsync(file.fileno())
    finally:
        writer.close()
    kept = tuple(n for n, k in kinds.items() if k == _Kind.F16 and _wanted(n, type) != _Kind.F16)
    counted = Counter(kind.name.lower() for kind in kinds.values())
    return Written(dict(counted), tuple(n for n in kept if len(shapes[n]) > 1), probes)


def model_bytes(architecture: Architecture, weights: Weights, type: WeightType, name: str) -> int:
    """About how large the file will be."""
    tensors = architecture.tensors(weights.names(), name)
    kinds, shapes = _planned(architecture, tensors, type, name)
    # A vocabulary takes some 40 bytes a token.
    return (
        sum(_nbytes(shapes[n], k) for n, k in kinds.items()) + 64 * architecture.config.vocab_size
    )


def _planned(
    architecture: Architecture, tensors: Mapping[str, str], type: WeightType, model: str
) -> tuple[dict[str, GGMLQuantizationType], dict[str, tuple[int, ...]]]:
    """Of each tensor the type that it is written in, and its shape."""
    state = build_skeleton(architecture.config, model).state_dict()
    shapes = {theirs: tuple(state[ours].shape) for theirs, ours in tensors.items()}
    return {name: _kind(name, shape, type) for name, shape in shapes.items()}, shapes


def _nbytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def _wanted(name: str, type: WeightType) -> GGMLQuantizationType:
    assert type.kind is not None
    return type.ends_kind if name in _ENDS else type.kind


def _kind(name: str, shape: tuple[int, ...], type: WeightType) -> GGMLQuantizationType:
    if len(shape) < 2:
        return _Kind.F32
    wanted = _wanted(name, type)
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else _Kind.F16


def _announce(
    writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType
) -> None:
    nbytes = _nbytes(shape, kind)
    writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)


def _in_type(
    values: Tensor, kind: GGMLQuantizationType, parameter: str, shape: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """The bytes of ``values`` (fp32) in ``kind``."""
    if tuple(values.shape) != shape:
        raise ModelError(
            f"{parameter} is of the shape {tuple(values.shape)}, and its model's configuration "
            f"asks for {shape}: the weights are not of this configuration."
        )
    if not bool(values.isfinite().all()):
        raise ModelError(f"{parameter} holds values that are no finite numbers: nothing was kept.")
    if kind == _Kind.F16 and float(values.abs().max()) > torch.finfo(torch.float16).max:
        raise ModelError(f"{parameter} holds values too large for fp16: choose --type bf16 or f32.")
    found: np.ndarray[Any, Any] = gguf.quantize(values.contiguous().numpy(), kind)
    return found
