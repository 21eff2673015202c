"""The weights of base model and adapter as one, a tensor at a time.

W' = W + s · B A of an adapted layer, and with DoRA (Liu et al., 2024, arXiv 2402.09353, eq. 5)

    W' = m / ‖W + s · B A‖ · (W + s · B A),    ‖ ‖ of each row,

made in fp32 and rounded once. W is the original weight, or what training saw of it: the same in
NF4. Rows of embedding and head that were trained take the place of the base's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from halfbyte.errors import ModelError
from halfbyte.model.adapter_files import SavedAdapter
from halfbyte.model.adapter_fit import adaptable_shapes, require_layers_fit
from halfbyte.model.experts import DOWN, UP, expert_name, find_experts
from halfbyte.model.lora_init import Pair, of_residual
from halfbyte.model.saved_scale import saved_scales
from halfbyte.model.skeleton import build_skeleton, quantized_linears
from halfbyte.model.source import ModelSource
from halfbyte.quant.nf4 import quantize_nf4
from halfbyte.recipe.schema import QuantizationRecipe

BaseWeights = Literal["4bit", "original"]
_WEIGHT = ".weight"


class MergedWeights:
    """Base plus adapter, a tensor at a time, by transformers' parameter name.

    With ``onto`` "4bit" the linear layers that training keeps in NF4, and each matrix of experts,
    go through NF4 first, as ``quantization`` says or as the checkpoint holds them; with
    "original" none does. ``start`` has A and B [r, in], [out, r] that a run of PiSSA began with:
    its 4-bit weights are those of W - s · B₀A₀, and the saved adapter has them in its second half.
    ``saved`` None is the base by itself. Products are made on ``device``.

    Raises ModelError for layers or shapes that the base does not have, and for "original" where
    the checkpoint holds 4-bit weights alone.
    """

    def __init__(
        self,
        source: ModelSource,
        saved: SavedAdapter | None,
        *,
        onto: BaseWeights,
        quantization: QuantizationRecipe,
        start: Mapping[str, Pair] | None = None,
        device: str = "cpu",
    ) -> None:
        if onto == "original" and source.stored_nf4 is not None:
            raise ModelError(
                f"the weights of {source.name} are there in 4 bits only, so that the adapter "
                "cannot be merged onto the original ones; leave --onto original out, or name the "
                "original model with --base."
            )
        self.source, self.saved, self.onto = source, saved, onto
        self._quantization, self._device = quantization, device
        self._start = dict(start or {}) if onto == "4bit" else {}
        self._scales = saved_scales(saved) if saved is not None else {}
        self._layers = dict(saved.layers) if saved is not None else {}
        self._magnitudes = saved.magnitudes if saved is not None else {}
        model = build_skeleton(source.config, source.name)
        linears = quantized_linears(model)
        self._shapes = {f"{n}{_WEIGHT}": tuple(m.weight.shape) for n, m in linears.items()}
        self._expert_counts = {
            f"{name}.{leaf}": len(module.get_parameter(leaf))
            for name, module in find_experts(model).items()
            for leaf in (UP, DOWN)
        }
        named = [n for n, _ in model.named_modules()]
        ends = model.get_input_embeddings(), model.get_output_embeddings()
        self._embedding, self._head = (
            next(f"{n}{_WEIGHT}" for n in named if model.get_submodule(n) is end) for end in ends
        )
        self._tied_in_config = ends[0].weight is ends[1].weight
        require_layers_fit(self._layers, adaptable_shapes(model), "that is merged", source.name)
        self._head_pair = self._layers.pop(_module(self._head), None)
        self._require_magnitudes()
        self._rows = self._trained_rows()

    def names(self) -> list[str]:
        """Those of the base, and the head's where the adapter makes it another than the embedding
        that it was tied to."""
        found = self.source.names()
        if self._tied_in_config and not self.tied and self._head not in found:
            found.append(self._head)
        return found

    @cached_property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix, after merging as well."""
        if not self._tied_in_config:
            return False
        there = self.source.names()
        if self._embedding in there and self._head in there:
            both = (self.source.read(name) for name in (self._embedding, self._head))
            if not torch.equal(*both):
                return False
        if self._head_pair is not None:
            return False
        modules = self.saved.modules if self.saved is not None else {}
        embedding, head = (modules.get(_module(n)) for n in (self._embedding, self._head))
        if embedding is None and head is None:
            return True
        if self.saved is not None and self.saved.config.get("ensure_weight_tying"):
            return True
        return embedding is not None and head is not None and torch.equal(embedding, head)

    def experts(self, name: str) -> int:
        """How many experts the parameter ``name`` holds the matrices of; 0: it is none of such."""
        return self._expert_counts.get(name, 0)

    @torch.no_grad()
    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor ``name`` on the CPU in ``dtype``, of integers as stored.

        ``name[e]`` is the matrix of one expert in a parameter of all. Raises KeyError for a name
        that is none of ``names()``, ModelError for a damaged file, for trained rows that do not
        fit, and for numbers that ``dtype`` has no room for.
        """
        if count := self.experts(name):
            return torch.stack([self.read(expert_name(name, e), dtype) for e in range(count)])
        if name in self._rows:
            return _rounded(self._vocabulary(name), dtype, name)
        if name.partition("[")[0] in self._expert_counts or name in self._shapes:
            return _rounded(self._matrix(name), dtype, name)
        stored = self.source.read(name)
        if not stored.is_floating_point():
            return stored.clone()
        return _rounded(stored, dtype, name)

    def _matrix(self, name: str) -> Tensor:
        """A linear layer's or an expert's, merged, fp32."""
        layer = _module(name)
        pair = self._layers.get(layer)
        start = self._start.get(layer)
        scale = self._scales.get(layer, 1.0)
        if self.onto == "4bit":
            weight = self._through_nf4(name, start, scale)
        else:
            weight = self.source.read(name, torch.float32).to(self._device)
        if pair is None:
            return weight
        if start is not None:
            pair = self._trained_half(layer, pair, start)
        a, b = (matrix.to(self._device, torch.float32) for matrix in pair)
        merged = weight.addmm_(b, a, alpha=scale)
        magnitude = self._magnitudes.get(layer)
        if magnitude is None:
            return merged
        norms = torch.linalg.vector_norm(merged, dim=1)
        return merged.mul_((magnitude.to(norms).view(-1) / norms)[:, None])

    def _through_nf4(self, name: str, start: Pair | None, scale: float) -> Tensor:
        """What training saw of a weight, fp32."""
        stored = self.source.stored_nf4
        if stored is not None:
            if name in stored.quantized:
                return self.source.nf4(name).to(self._device).dequantize(torch.float32)
            return self.source.read(name, torch.float32).to(self._device)
        weight = self.source.read(name).to(self._device)
        if start is not None:
            a, b = (matrix.to(self._device, torch.float32) for matrix in start)
            weight = weight.float() - scale * (b @ a)
        how = self._quantization
        packed = quantize_nf4(weight, block_size=how.block_size, double_quant=how.double_quant)
        return packed.dequantize(torch.float32)

    def _trained_half(self, layer: str, pair: Pair, start: Pair) -> Pair:
        if len(pair[0]) != 2 * len(start[0]):
            raise ModelError(
                f"the adapter has rank {len(pair[0])} at {layer} and the run's initial_adapter "
                f"{len(start[0])}, where a run of PiSSA saves twice as much: the two are not of "
                "one run."
            )
        return of_residual(pair)[0]

    def _vocabulary(self, name: str) -> Tensor:
        """Embedding or head with what was trained of it, fp32."""
        weight: Tensor | None = None
        for rows, ids in self._rows[name]:
            if ids is None:
                weight = rows.to(torch.float32, copy=True)
            else:
                weight = self._read_end(name, torch.float32) if weight is None else weight
                weight[ids] = rows.to(torch.float32)
        if weight is None:
            weight = self._read_end(name, torch.float32)
        if name == self._head and self._head_pair is not None:
            a, b = (matrix.to(torch.float32) for matrix in self._head_pair)
            weight.addmm_(b, a, alpha=self._scales[_module(name)])
        return weight

    def _read_end(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The base's embedding or head; of a tied pair the one that its files hold."""
        if name not in self.source.names():
            name = self._head if name == self._embedding else self._embedding
        return self.source.read(name, dtype)

    def _require_magnitudes(self) -> None:
        """DoRA's m [out] has a number for each row of its weight."""
        head = _module(self._head)
        for name, vector in self._magnitudes.items():
            if name == head:
                raise ModelError(
                    f"the adapter has DoRA on the output head {head}, which halfbyte does not "
                    "merge; merge it with PEFT's merge_and_unload."
                )
            if vector.numel() != self._shapes[f"{name}{_WEIGHT}"][0]:
                raise ModelError(
                    f"the magnitudes of {name} are {vector.numel()}, one of each row of a weight "
                    f"with {self._shapes[f'{name}{_WEIGHT}'][0]}: the adapter is damaged."
                )

    def _trained_rows(self) -> dict[str, list[tuple[Tensor, list[int] | None]]]:
        """By the name of embedding or head what takes the place of the base's, one after another:
        rows [n, H], and which they are (None: all)."""
        if self.saved is None:
            return {}
        found: dict[str, list[tuple[Tensor, list[int] | None]]] = {}
        for module, weight in self.saved.modules.items():
            self._require_rows(module, weight)
            found[f"{module}{_WEIGHT}"] = [(weight, None)]
        if self.tied and len(found) == 1:  # PEFT's ensure_weight_tying
            (whole,) = found.values()
            found = {self._embedding: whole, self._head: [*whole]}
        token_ids = self.saved.token_ids()
        for module, rows in self.saved.token_rows.items():
            name = f"{module}{_WEIGHT}"
            ids = token_ids[module]
            size = self._read_end(name).shape
            if rows.shape[1] != size[1] or max(ids) >= size[0]:
                raise ModelError(
                    f"the adapter's trained rows of {module} do not fit the {size[0]:,} tokens of "
                    f"{self.source.name}: it belongs to another base model."
                )
            # PEFT keeps such rows of both ends the same where the base has one weight for both.
            both = self._tied_in_config and len(self.saved.token_rows) == 1
            for end in (self._embedding, self._head) if both else (name,):
                found.setdefault(end, []).append((rows, ids))
        if self._head_pair is not None or (self._tied_in_config and not self.tied):
            found.setdefault(self._head, [])
        return found

    def _require_rows(self, module: str, weight: Tensor) -> None:
        name = f"{module}{_WEIGHT}"
        if name not in (self._embedding, self._head):
            raise ModelError(
                f"the adapter holds all of {module}, which is neither embedding nor head of "
                f"{self.source.name}; halfbyte merges no other modules_to_save."
            )
        size = self._read_end(name).shape
        if weight.shape != size:
            raise ModelError(
                f"the adapter's {module} is {list(weight.shape)} and that of {self.source.name} "
                f"is {list(size)}: it belongs to another base model."
            )


def _module(name: str) -> str:
    return name.removesuffix(_WEIGHT)


def _rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A copy on the CPU in ``dtype``."""
    found = torch.empty(tensor.shape, dtype=dtype).copy_(tensor)
    if dtype == torch.float16 and found.isinf().any():
        raise ModelError(
            f"{name} has numbers over 65,504, for which fp16 has no room: merge with --dtype bf16."
        )
    return found
