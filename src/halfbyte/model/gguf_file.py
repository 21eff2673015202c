"""A GGUF file: its metadata, and its tensors one at a time as transformers lays them out.

The header is read by the ``gguf`` package, and its ``dequantize`` turns blocks into fp32. Tensors
are read from the file by offset rather than through the package's memory map, whose pages would
stay resident one after the other until the whole file was.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from torch import Tensor

from halfbyte.errors import ModelError
from halfbyte.model.names import gguf_parameter_names
from halfbyte.model.wording import reason

# Values dequantized at once, so that what is made on the way stays under 100 MB.
_CHUNK = 1 << 22
# Bytes of a text of the metadata; the longest are chat templates of some kilobytes.
_LONGEST_TEXT = 16 << 20
# What reading a damaged file comes to.
_DAMAGED = (ValueError, LookupError, OSError, ArithmeticError, TypeError, struct.error)


@dataclass(frozen=True)
class _Place:
    offset: int
    nbytes: int
    type: GGMLQuantizationType
    shape: tuple[int, ...]  # rows first, as in torch


class _Header(gguf.GGUFReader):
    """The package's reader, passing over arrays of strings and taking others whole.

    The package makes a numpy object of every element, which for a vocabulary of 49,152 tokens with
    its merges takes 2.5 s and 130 MB; the vocabulary is the tokenizer's business, and of it only
    its length is wanted here.
    """

    def _get_str(self, offset: int) -> tuple[Any, Any]:
        """As the package's, but a text that is none is refused before it is read."""
        length, text = self._get(offset, np.uint64), int(self._get(offset, np.uint64)[0])
        if text > min(_LONGEST_TEXT, len(self.data) - offset - 8):
            raise ValueError(f"it speaks of a text of {text:,} bytes")
        return length, self._get(offset + 8, np.uint8, text)

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        types = [GGUFValueType.ARRAY, GGUFValueType(int(item[0]))]
        at = orig_offs + 12
        if types[1] == GGUFValueType.STRING:
            raw = memoryview(self.data)
            for _ in range(int(count[0])):
                at += 8 + struct.unpack_from("=Q", raw, at)[0]
            return at - orig_offs, [item, count], [], types
        if types[1] == GGUFValueType.ARRAY:
            raise ValueError("it holds an array of arrays")
        numpy_type = self.gguf_scalar_to_np.get(types[1])
        if numpy_type is None:
            raise ValueError(f"it holds an array of {types[1].name}")
        values = self._get(at, numpy_type, int(count[0]))
        if len(values) != int(count[0]):
            raise ValueError(f"it speaks of an array of {int(count[0]):,} numbers")
        return at - orig_offs + int(values.nbytes), [item, count, values], [2], types


class GgufFile:
    """``metadata`` holds scalars and arrays of numbers by key, ``lengths`` those of all arrays."""

    def __init__(self, path: Path) -> None:
        """Read the header of ``path``.

        Raises ModelError for a file that is no GGUF file, is damaged or cut off, or holds tensors
        in a format that the ``gguf`` package cannot dequantize.
        """
        self.path = path
        try:
            header = _Header(path)
            if header.byte_order == "S":
                raise ValueError("its byte order is not this machine's")
            fields = dict(header.fields)
            self.metadata: dict[str, Any] = {key: f.contents() for key, f in fields.items()}
            self.lengths = {
                key: int(f.parts[-1 - len(f.data)][0])
                for key, f in fields.items()
                if f.types and f.types[0] == GGUFValueType.ARRAY
            }
            for t in header.tensors:
                _require_whole(t.name, t.shape.tolist(), t.tensor_type, int(t.n_bytes))
            self._text_places = {
                # Behind the key: two types and the number of texts.
                key: f.offset + sum(int(part.nbytes) for part in f.parts[:3]) + 12
                for key, f in fields.items()
                if f.types == [GGUFValueType.ARRAY, GGUFValueType.STRING]
            }
            places = {
                t.name: _Place(
                    int(t.data_offset),
                    int(t.n_bytes),
                    t.tensor_type,
                    tuple(reversed(t.shape.tolist())),
                )
                for t in header.tensors
            }
        except FileNotFoundError as error:
            raise ModelError(f"there is no model file {path}.") from error
        except (
            ValueError,
            LookupError,
            OSError,
            ArithmeticError,
            TypeError,
            struct.error,
        ) as error:
            raise ModelError(
                f"{path} is no whole GGUF file of this machine ({reason(error)}); get it again."
            ) from error
        _require_readable(path, places)
        self._places = places
        self.architecture = str(self.metadata.get("general.architecture"))

    @property
    def file_bytes(self) -> int:
        """How large the file is."""
        return self.path.stat().st_size

    def texts(self, key: str) -> list[str]:
        """The array of texts ``key`` of the metadata; none where there is no such array.

        Raises ModelError where one is no text, or is longer than any is.
        """
        at = self._text_places.get(key)
        if at is None:
            return []
        found = []
        with self.path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as raw:
            for _ in range(self.lengths[key]):
                (length,) = struct.unpack_from("<Q", raw, at)
                text = raw[at + 8 : at + 8 + min(length, _LONGEST_TEXT + 1)]
                try:
                    found.append(text.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise ModelError(f"{self.path} has {key} that are no text.") from error
                if length > _LONGEST_TEXT:
                    raise ModelError(f"{self.path} has {key} of {length:,} bytes: get it again.")
                at += 8 + length
        return found

    def names(self) -> list[str]:
        """All tensors, as the file names them."""
        return list(self._places)

    def files(self) -> list[Path]:
        """The one file."""
        return [self.path]

    def parameter_names(self, model: Any) -> dict[str, str]:
        """Name in ``model`` (of transformers): name in the file; unknown ones keep theirs."""
        return gguf_parameter_names(model, self.architecture, self._places)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor ``name`` on the CPU, as transformers lays it out, in ``dtype`` or fp32.

        It is dequantized in fp32 piece by piece, so a narrower ``dtype`` also takes less room.
        """
        place = self._places[name]
        with self.path.open("rb") as file:
            file.seek(place.offset)
            raw = np.fromfile(file, np.uint8, place.nbytes)
        if len(raw) < place.nbytes:
            raise ModelError(f"{self.path} was cut off while it was read; get it again.")
        values = _dequantized(raw, place, dtype or torch.float32)
        if self.architecture == "llama" and name.split(".")[-2] in ("attn_q", "attn_k"):
            heads = self.metadata["llama.attention.head_count"]
            if ".attn_k." in name:
                heads = self.metadata.get("llama.attention.head_count_kv", heads)
            values = _halves_apart(values, int(heads))
        return values


def _require_whole(name: str, shape: list[int], kind: GGMLQuantizationType, nbytes: int) -> None:
    """Raise ValueError where the bytes of a tensor are not what its shape asks for.

    The package multiplies the sizes in 64 bits, of which the lower ones stay.
    """
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    values = math.prod(shape)
    if not shape or values < 1 or shape[0] % block or values // block * block_bytes != nbytes:
        raise ValueError(f"its tensor {name} is of the shape {shape}")


def _dequantized(raw: np.ndarray, place: _Place, dtype: torch.dtype) -> Tensor:
    """The values of ``raw`` in the tensor's shape, row after row."""
    rows = raw.reshape(-1, raw.size * place.shape[-1] // int(np.prod(place.shape)))
    values = torch.empty(len(rows), place.shape[-1], dtype=dtype)
    step = max(1, _CHUNK // place.shape[-1])
    for start in range(0, len(rows), step):
        piece = gguf.dequantize(rows[start : start + step], place.type)
        values[start : start + step] = torch.from_numpy(piece)
    return values.view(place.shape)


def _halves_apart(values: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's permutation of q and k.

    Its rotary embedding turns neighbouring rows of a head, transformers' turns row i with row
    i + D/2, so its converter interleaves the two halves of each head: [heads, 2, D/2] is stored
    as [heads, D/2, 2].
    """
    pairs = values.view(heads, -1, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)


def _require_readable(path: Path, places: dict[str, _Place]) -> None:
    size = path.stat().st_size
    for name, place in places.items():
        if place.offset + place.nbytes > size:
            raise ModelError(f"{path} was cut off before the end of {name}; get it again.")
    for kind in {place.type for place in places.values()}:
        _, type_size = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros((1, type_size), np.uint8), kind)
        except NotImplementedError as error:
            raise ModelError(
                f"{path} holds weights in {kind.name}, which cannot be dequantized: name a file in "
                "F16, BF16, Q8_0 or one of the Q4 to Q6 formats."
            ) from error
