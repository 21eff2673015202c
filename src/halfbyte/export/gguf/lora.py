"""A LoRA adapter as llama.cpp takes it beside a model (``--lora``)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFType

from halfbyte.errors import ModelError
from halfbyte.export.gguf.architecture import Architecture
from halfbyte.export.gguf.model import Described
from halfbyte.model.adapter_files import SavedAdapter

TYPES = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
}


def require_plain(saved: SavedAdapter) -> None:
    """Raise ModelError for what llama.cpp's adapters have no place for."""
    what = "DoRA" if saved.magnitudes else None
    if saved.modules or saved.token_rows:
        what = "trained embeddings" if what is None else f"{what} and trained embeddings"
    if what is not None:
        raise ModelError(
            f"the adapter has {what}, for which llama.cpp's adapters have no place: export the "
            "merged model with --to gguf."
        )


def write_lora(
    path: Path,
    saved: SavedAdapter,
    scales: Mapping[str, float],
    architecture: Architecture,
    *,
    type: str,
    described: Described,
) -> float:
    """Write the adapter ``saved`` to ``path`` and return the alpha that the file states.

    llama.cpp multiplies B·A by alpha / rank, with one alpha for all layers. ``scales`` are what
    each layer's product is really multiplied by; where they differ by more than the ranks explain,
    B takes the rest. Raises ModelError for what such files have no place for.
    """
    require_plain(saved)
    kind = TYPES[type]
    parameters = architecture.tensors([f"{n}.weight" for n in saved.layers], described.name)
    alphas = {name: scales[name] * len(a) for name, (a, _) in saved.layers.items()}
    alpha = max(sorted(set(alphas.values())), key=list(alphas.values()).count)
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(alpha))
    described.add_to(writer)
    for theirs, parameter in parameters.items():
        layer = parameter.removesuffix(".weight")
        a, b = (matrix.float() for matrix in saved.layers[layer])
        b = architecture.as_stored(theirs, b * (alphas[layer] / alpha))
        for suffix, matrix in (("lora_a", a), ("lora_b", b)):
            writer.add_tensor(f"{theirs}.{suffix}", *_stored(matrix, kind, layer))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        assert writer.fout is not None
        for file in writer.fout:
            file.flush()
            os.fsync(file.fileno())
    finally:
        writer.close()
    return float(alpha)


def _stored(
    matrix: torch.Tensor, kind: GGMLQuantizationType, layer: str
) -> tuple[np.ndarray, tuple[int, ...] | None, GGMLQuantizationType]:
    """Values, shape (None: theirs) and type, as ``add_tensor`` takes them."""
    if not bool(matrix.isfinite().all()):
        raise ModelError(f"the adapter's {layer} holds values that are no finite numbers.")
    values = gguf.quantize(matrix.contiguous().numpy(), kind)
    if kind == GGMLQuantizationType.F16 and not np.isfinite(values).all():
        raise ModelError(f"the adapter's {layer} is too large for fp16: choose --type f32.")
    return values, None, kind
