"""Tensors of a folder's safetensors files, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import ModelError
from halfbyte.foreign_json import read_json
from halfbyte.model.names import parameter_names
from halfbyte.model.wording import reason, some

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class SafetensorsFiles:
    """The checkpoint of a folder: ``model.safetensors``, or shards with their index.

    Each file's header is checked when the object is made. A file is mapped anew for each tensor
    and let go with it, so that pages read for one tensor do not stay resident with the next.
    """

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files  # tensor name: file

    @classmethod
    def of_folder(cls, folder: Path) -> SafetensorsFiles:
        """Open the headers of the checkpoint in ``folder``.

        Raises ModelError for a folder without safetensors, a missing shard, a damaged or cut off
        file, and an index that does not fit its files.
        """
        if (folder / INDEX).is_file():
            wanted = _read_index(folder)
            there: dict[str, Path] = {}
            for shard in sorted(set(wanted.values())):
                there |= dict.fromkeys(_header_names(folder / shard), folder / shard)
            lost = [n for n, shard in wanted.items() if there.get(n) != folder / shard]
            if lost:
                raise ModelError(
                    f"{folder / INDEX} lists {some(lost)}, which the shards do not hold; "
                    "get the model's files again."
                )
            return cls(there)
        if (folder / SINGLE).is_file():
            path = folder / SINGLE
            return cls(dict.fromkeys(_header_names(path), path))
        others = sorted(folder.glob("*.safetensors"))
        if len(others) == 1 and others[0].name != "adapter_model.safetensors":
            return cls(dict.fromkeys(_header_names(others[0]), others[0]))
        raise ModelError(_why_none(folder))

    @property
    def file_bytes(self) -> int:
        """How large the files are that hold the tensors."""
        return sum(path.stat().st_size for path in set(self._files.values()))

    def names(self) -> list[str]:
        """All tensors, as the files name them."""
        return list(self._files)

    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted(set(self._files.values()))

    def parameter_names(self, model: Any) -> dict[str, str]:
        """Name in ``model`` (of transformers): name in the files; unknown ones keep theirs."""
        return parameter_names(model, self._files)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor ``name`` on the CPU: a copy in ``dtype``, or as it is stored.

        As stored its memory is the file's own pages: copy it before changing or keeping it.
        Raises ModelError for a damaged file and for numbers other than fp32, bf16 and fp16 (8-bit
        ones need scales that stand elsewhere).
        """
        import torch
        from safetensors import SafetensorError, safe_open

        path = self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                stored = file.get_tensor(name)
        except (SafetensorError, OSError, TypeError, KeyError) as error:
            raise ModelError(f"tensor {name} of {path} cannot be read: {reason(error)}.") from error
        floats = (torch.float32, torch.bfloat16, torch.float16)
        if stored.dtype not in floats and (dtype in floats or stored.is_floating_point()):
            kind = str(stored.dtype).removeprefix("torch.")
            raise ModelError(
                f"tensor {name} of {path} is stored as {kind}, and only fp32, bf16 and fp16 are "
                "read: name a model in one of those."
            )
        if dtype is None:
            return stored
        return torch.empty(stored.shape, dtype=dtype).copy_(stored)


def _header_names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    if path.exists() and not path.is_file():
        raise ModelError(f"{path}, a part of the model, is no regular file: get it again.")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except FileNotFoundError as error:
        raise ModelError(
            f"{path}, a part of the model, is missing; get the model's files again."
        ) from error
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is damaged or was cut off ({reason(error)}); get the model's files again."
        ) from error


def _read_index(folder: Path) -> dict[str, str]:
    try:
        weight_map = read_json(folder / INDEX)["weight_map"]
        good = bool(weight_map) and all(
            isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder / INDEX} is not an index of safetensors files: get it again."
        ) from error
    if not good:
        raise ModelError(f"{folder / INDEX} does not name files of its own folder: get it again.")
    return dict(weight_map)


def _why_none(folder: Path) -> str:
    pickled = sorted(
        path.name for end in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(end)
    )
    if pickled:
        return (
            f"the weights in {folder} are pickled ({some(pickled)}), which can run code when "
            "read; halfbyte reads only safetensors and GGUF, so take a copy of the model in one "
            "of those."
        )
    return f"{folder} holds no {SINGLE}, no {INDEX} and no GGUF file: name a model's folder."
