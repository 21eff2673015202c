"""A finished adapter's model in memory, ready to be asked and measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from halfbyte.errors import ModelError
from halfbyte.finished.ends import settle_ends
from halfbyte.finished.found import FoundAdapter, find_adapter, open_base
from halfbyte.model.adapter_files import SavedAdapter
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.load import load_base
from halfbyte.model.lora import attach_saved
from halfbyte.model.new_tokens import NewTokens
from halfbyte.model.saved_scale import saved_scales
from halfbyte.model.source import ModelSource
from halfbyte.model.trained_rows import TrainedRows, train_rows
from halfbyte.plan.device import Device, find_device
from halfbyte.plan.precision import choose_precision
from halfbyte.recipe.schema import QuantizationRecipe
from halfbyte.run.adapter_start import put_saved
from halfbyte.run.precision import DTYPES
from halfbyte.run.setup import load_model


@dataclass(frozen=True)
class OpenedAdapter:
    """A base model in 4 bits with an adapter, and the tokenizer with the trained template."""

    found: FoundAdapter
    source: ModelSource
    qlora: QLoRAModel  # ``adapter_on(False)`` is the base

    @property
    def folder(self) -> Path:
        """As it was named."""
        return self.found.folder

    @property
    def tokenizer(self) -> Any:
        """Of transformers."""
        return self.source.tokenizer

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.qlora.network

    @property
    def single_turn(self) -> bool:
        """Whether each message stands alone, as in a format whose rows were one question each."""
        recipe = self.found.recipe
        return recipe is not None and recipe.data.template not in ("auto", "chat")


def open_adapter(
    folder: Path | FoundAdapter,
    *,
    base: str | None = None,
    device: str = "auto",
    copies: bool = True,
    source: ModelSource | None = None,
) -> OpenedAdapter:
    """The model of the adapter in ``folder``, as it was trained: base in 4 bits, adapter beside.

    An adapter from elsewhere gets its base in NF4 with halfbyte's defaults, or as its checkpoint is
    quantized already. ``source`` is what ``open_base`` gave, where it was called before: reading a
    tokenizer and a GGUF file's header takes seconds. With ``copies`` the weights are kept
    dequantized as well where they take at most half of the memory that is free, which is faster.
    Raises what :func:`~halfbyte.finished.found.find_adapter` and
    :func:`~halfbyte.finished.found.open_base` raise, and ModelError where the
    adapter's tensors do not fit.
    """
    found = folder if isinstance(folder, FoundAdapter) else find_adapter(folder, base)
    source = open_base(found) if source is None else source
    on = find_device(device)
    qlora = _of_run(found, source, on) if found.recipe else _from_elsewhere(found, source, on)
    if copies and _copies_bytes(qlora) <= _free_bytes(on) // 2:
        for layer in qlora.linears.values():
            layer.keep_dense()
    qlora.network.eval()
    return OpenedAdapter(found, source, qlora)


def _of_run(found: FoundAdapter, source: ModelSource, device: Device) -> QLoRAModel:
    recipe = found.recipe
    assert recipe is not None
    if device.kind == "cpu" and recipe.precision != "fp32" and not device.bf16_native:
        recipe = recipe.model_copy(update={"precision": "fp32"})
    qlora, _ = load_model(recipe, source, device, begun=found.run, copied_layers=0)
    if found.saved.layers.keys() != qlora.lora.keys():
        raise ModelError(f"the adapter in {found.folder} is not one of {source.name}'s layers.")
    put_saved(qlora, found.saved)
    return qlora


def _from_elsewhere(found: FoundAdapter, source: ModelSource, device: Device) -> QLoRAModel:
    compute_dtype = DTYPES[choose_precision(device)[0]]
    loaded = load_base(
        source,
        quantization=QuantizationRecipe(),
        device=device.kind,
        compute_dtype=compute_dtype,
        rest_dtype=compute_dtype,
    )
    scales, dora = saved_scales(found.saved), bool(found.saved.config.get("use_dora"))
    saved = settle_ends(loaded.model, found.saved, scales)
    lora = attach_saved(loaded.model, saved.layers, scales, use_dora=dora)
    rows = _trained_rows(loaded.model, saved)
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    qlora = QLoRAModel(loaded.model, lora, compute_dtype, rows)
    put_saved(qlora, saved)
    return qlora


def _copies_bytes(qlora: QLoRAModel) -> int:
    size = qlora.compute_dtype.itemsize
    return sum(m.in_features * m.out_features * size for m in qlora.linears.values())


def _free_bytes(device: Device) -> int:
    if device.kind == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def _trained_rows(network: Any, saved: SavedAdapter) -> dict[str, TrainedRows]:
    """Places for what the adapter has of embedding and head, as ``settle_ends`` left it."""
    ids = saved.token_ids()
    size = len(network.get_input_embeddings().weight)
    new = next((NewTokens(one[0], len(one), size, size) for one in ids.values()), None)
    leaves = {name.rpartition(".")[2] for name in saved.modules}
    kept = saved.modules.keys() | ids.keys()
    found = train_rows(network, new, leaves)
    return {key: rows for key, rows in found.items() if rows.name in kept}
