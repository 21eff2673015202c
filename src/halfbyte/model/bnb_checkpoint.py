"""Checkpoints that bitsandbytes has quantized to NF4, as transformers saves them.

Beside a weight's codes stand its scales and, as JSON in a tensor of bytes, how they are to be read:

    q_proj.weight                                    codes, two to a byte, in any storage type
    q_proj.weight.absmax                             fp32, or uint8 with double quantization
    q_proj.weight.nested_absmax                      then the scales of the scales, fp32
    q_proj.weight.quant_map, .nested_quant_map       the code books
    q_proj.weight.quant_state.bitsandbytes__nf4      {"blocksize": 64, "shape": [out, in], …}

Codes and scales are taken as they are. What such a checkpoint holds in 16 bits stays in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import ModelError
from halfbyte.foreign_json import parse_json
from halfbyte.kernels.nf4 import CODE_BOOK, SCALES_PER_BLOCK, block_count, code_count, dynamic_map
from halfbyte.model.names import parameter_names
from halfbyte.model.safetensors_files import SafetensorsFiles
from halfbyte.model.wording import reason
from halfbyte.quant.nf4 import NF4Weight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

METHOD = "bitsandbytes nf4"
_STATE = ".quant_state.bitsandbytes__nf4"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _STATE)


def quantization_method(settings: Any) -> str:
    """What a configuration's ``quantization_config`` says, in words."""
    if not isinstance(settings, dict):
        return "unknown"
    method = str(settings.get("quant_method", "unknown"))
    if method != "bitsandbytes":
        return method
    if settings.get("load_in_4bit") or settings.get("_load_in_4bit"):
        return f"{method} {settings.get('bnb_4bit_quant_type', 'fp4')}"
    return f"{method} 8-bit"


@dataclass(frozen=True)
class StoredNF4:
    """How a checkpoint's weights are quantized, and which; names are transformers' parameters'."""

    block_size: int
    double_quant: bool
    quantized: frozenset[str]


class BnbCheckpoint:
    """The tensors of ``files``, those in NF4 as one tensor each."""

    def __init__(self, files: SafetensorsFiles) -> None:
        names = files.names()
        self._files = files
        self.quantized = {n.removesuffix(_STATE) for n in names if n.endswith(_STATE)}
        parts = {weight + part for weight in self.quantized for part in _PARTS}
        self._names = [name for name in names if name not in parts]
        self._there = set(names)
        state = self._state(min(self.quantized))
        self.block_size, self.double_quant = int(state["blocksize"]), "nested_blocksize" in state

    @staticmethod
    def is_one(files: SafetensorsFiles) -> bool:
        """Whether any tensor of ``files`` is in NF4."""
        return any(name.endswith(_STATE) for name in files.names())

    @property
    def file_bytes(self) -> int:
        """How large the files are that hold the tensors."""
        return self._files.file_bytes

    def names(self) -> list[str]:
        """All tensors but the scales, code books and settings of those in NF4."""
        return list(self._names)

    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return self._files.files()

    def parameter_names(self, model: Any) -> dict[str, str]:
        """Name in ``model`` (of transformers): name in the files; unknown ones keep theirs."""
        return parameter_names(model, self._names)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """As :meth:`SafetensorsFiles.read`; a weight in NF4 is dequantized, to fp32 by default."""
        import torch

        if name not in self.quantized:
            return self._files.read(name, dtype)
        return self.nf4(name).dequantize(dtype or torch.float32)

    def nf4(self, name: str) -> NF4Weight:
        """The weight ``name``, one of ``quantized``, on the CPU.

        Raises ModelError where a part is missing, does not fit, or is not what NF4 has.
        """
        import torch

        state = self._state(name)
        if (int(state["blocksize"]), "nested_blocksize" in state) != (
            self.block_size,
            self.double_quant,
        ):
            raise self._wrong(name, "is quantized in another way than the others")
        shape = tuple(int(size) for size in state["shape"])
        n = shape[0] * shape[1] if len(shape) == 2 else -1
        codes = self._part(name, "").contiguous().view(torch.uint8).view(-1)
        absmax = self._part(name, ".absmax").view(-1)
        blocks = block_count(n, self.block_size)
        scale = torch.uint8 if self.double_quant else torch.float32
        if (len(codes), len(absmax), absmax.dtype) != (code_count(n), blocks, scale):
            raise self._wrong(name, f"holds codes or scales that no {list(shape)} has")
        book = self._part(name, ".quant_map")
        if not torch.equal(book, torch.tensor(CODE_BOOK)):
            raise self._wrong(name, "has another code book than NF4's")
        if not self.double_quant:
            return NF4Weight(codes, absmax, shape, self.block_size)
        nested = self._part(name, ".nested_absmax").view(-1)
        same_book = torch.equal(self._part(name, ".nested_quant_map"), dynamic_map(signed=True))
        if (
            not same_book
            or state["nested_blocksize"] != SCALES_PER_BLOCK
            or (len(nested), nested.dtype) != (-(-blocks // SCALES_PER_BLOCK), torch.float32)
        ):
            raise self._wrong(name, "has scales in another form than bitsandbytes gives them")
        offset = torch.tensor(float(state["nested_offset"]), dtype=torch.float32)
        return NF4Weight(codes, absmax, shape, self.block_size, nested, offset)

    def _part(self, name: str, part: str) -> Tensor:
        if name + part not in self._there:
            raise self._wrong(name, f"lacks its {part.removeprefix('.')}")
        return self._files.read(name + part)

    def _state(self, name: str) -> dict[str, Any]:
        try:
            state = parse_json(bytes(self._part(name, _STATE).numpy()).decode())
            wanted = {"blocksize", "shape"}
            if "nested_blocksize" in state:
                wanted |= {"nested_offset"}
            if not wanted <= state.keys() or state["quant_type"] != "nf4":
                raise ValueError(f"it says {state}")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise self._wrong(name, f"is not described as NF4 ({reason(error)})") from error
        return dict(state)

    def _wrong(self, name: str, what: str) -> ModelError:
        return ModelError(
            f"the quantized tensor {name} {what}: get the model's files again, or name its "
            "original."
        )
