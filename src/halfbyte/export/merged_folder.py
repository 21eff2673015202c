"""Merged weights as the folder of a transformers model, under the base's own names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ModelError
from halfbyte.export.merged_weights import MergedWeights
from halfbyte.export.safetensors_stream import Planned, write_safetensors
from halfbyte.foreign_json import read_json
from halfbyte.model.experts import expert_name
from halfbyte.model.names import expert_keys
from halfbyte.model.safetensors_files import INDEX, SINGLE
from halfbyte.model.skeleton import build_skeleton
from halfbyte.model.source import ModelSource
from halfbyte.model.wording import reason

GENERATION = "generation_config.json"
_SENTENCEPIECE = "tokenizer.model"
# In a configuration, what was said of the files that the weights came from.
_OF_THE_BASE = ("quantization_config", "auto_map", "_name_or_path", "transformers_version")


@dataclass(frozen=True)
class _Part:
    """A tensor of the folder: all of what transformers calls ``source``, or rows of it."""

    planned: Planned
    source: str
    rows: slice | None = None


class MergedFolder:
    """What of ``merged`` will be written, in numbers of ``dtype``.

    Vectors that the architecture keeps in fp32 stay fp32.
    """

    def __init__(self, merged: MergedWeights, dtype: torch.dtype, shard_bytes: int) -> None:
        self.merged, self.dtype = merged, dtype
        self._skeleton = build_skeleton(merged.source.config, merged.source.name)
        parts = list(self._parts())
        self._parts_of = {part.planned.name: part for part in parts}
        self.shards = _shards([part.planned for part in parts], shard_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(one.nbytes for shard in self.shards for one in shard)

    @property
    def tensors(self) -> int:
        """How many tensors there are."""
        return len(self._parts_of)

    def write_weights(
        self, folder: Path, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Write the files of weights, with an index where there are several.

        One tensor is in memory at a time. ``progress`` hears how many of how many are written.
        """
        done, total = 0, self.tensors
        index: dict[str, str] = {}
        for number, shard in enumerate(self.shards, 1):
            several = len(self.shards) > 1
            file = f"model-{number:05}-of-{len(self.shards):05}.safetensors" if several else SINGLE

            def make(planned: Planned) -> Tensor:
                nonlocal done
                tensor = self._make(planned)
                done += 1
                progress(done, total)
                return tensor

            write_safetensors(folder / file, shard, make)
            index |= dict.fromkeys((one.name for one in shard), file)
        if len(self.shards) > 1:
            about = {"metadata": {"total_size": self.nbytes}, "weight_map": index}
            _write_json(folder / INDEX, about)

    def write_settings(self, folder: Path, tokenizer: Any, ends: Sequence[int] = ()) -> None:
        """Write configuration, generation settings and the tokenizer with its template.

        ``ends`` are tokens that end an answer, beside those that the base's settings name.
        """
        source = self.merged.source
        config = self._config()
        _write_json(folder / "config.json", config)
        _write_json(folder / GENERATION, self._generation(config, ends))
        tokenizer.save_pretrained(folder)
        if isinstance(tokenizer.chat_template, str):
            (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
        pieces = _base_folder(source) / _SENTENCEPIECE if source.format == "safetensors" else None
        if pieces is not None and pieces.is_file() and not (folder / _SENTENCEPIECE).exists():
            shutil.copyfile(pieces, folder / _SENTENCEPIECE)

    def _parts(self) -> list[_Part]:
        """The tensors in the order in which transformers' model has them, experts apart where the
        base's files have them apart."""
        source = self.merged.source
        state = self._skeleton.state_dict(keep_vars=True)
        keys = source.checkpoint.names()
        apart: dict[str, dict[int, list[str]]] = {}
        own: dict[str, str] = {}
        if source.format == "safetensors":
            own = source.checkpoint.parameter_names(self._skeleton)
            apart = expert_keys(self._skeleton, keys)
        order = {name: place for place, name in enumerate(state)}
        names = sorted(self.merged.names(), key=lambda name: order.get(name, len(order)))
        found = []
        for name in names:
            if name in apart:
                found += self._experts_apart(name, apart[name], state[name])
                continue
            tensor = state.get(name)
            shape, dtype = self._form(name, tensor)
            found.append(_Part(Planned(own.get(name, name), shape, dtype), name))
        return found

    def _experts_apart(
        self, name: str, experts: dict[int, list[str]], parameter: Tensor
    ) -> list[_Part]:
        found = []
        for expert, keys in sorted(experts.items()):
            rows, columns = parameter.shape[1] // len(keys), parameter.shape[2]
            for number, key in enumerate(keys):
                planned = Planned(key, (rows, columns), self.dtype)
                part = slice(number * rows, (number + 1) * rows)
                found.append(_Part(planned, expert_name(name, expert), part))
        return found

    def _form(self, name: str, tensor: Tensor | None) -> tuple[tuple[int, ...], torch.dtype]:
        if tensor is None:  # a buffer that is computed today
            stored = self.merged.source.read(name)
            return tuple(stored.shape), stored.dtype
        if not tensor.is_floating_point():
            return tuple(tensor.shape), tensor.dtype
        wide = {
            *(self._skeleton._keep_in_fp32_modules or ()),
            *(getattr(self._skeleton, "_keep_in_fp32_modules_strict", None) or ()),
        }
        keeps = tensor.dim() < 2 and not wide.isdisjoint(name.split("."))
        return tuple(tensor.shape), torch.float32 if keeps else self.dtype

    def _make(self, planned: Planned) -> Tensor:
        part = self._parts_of[planned.name]
        tensor = self.merged.read(part.source, planned.dtype)
        return tensor if part.rows is None else tensor[part.rows]

    def _config(self) -> dict[str, Any]:
        """The base's own configuration, which other programs know how to read, brought up to date.

        transformers would write it anew, in the words of today.
        """
        source = self.merged.source
        text = source.config.get_text_config()
        if source.format == "safetensors":
            path = _base_folder(source) / "config.json"
            try:
                config = dict(read_json(path))
            except (OSError, ValueError, TypeError) as error:
                raise ModelError(f"{path} cannot be read: {reason(error)}.") from error
        else:
            config = source.config.to_diff_dict()
            # Of these, programs other than transformers know the older spelling.
            base = (config.get("rope_parameters") or {}).get("rope_theta")
            config |= {} if base is None else {"rope_theta": base}
        for key in _OF_THE_BASE:
            config.pop(key, None)
        config["architectures"] = [type(self._skeleton).__name__]
        name = str(self.dtype).removeprefix("torch.")
        for key in ("torch_dtype", "dtype"):
            config[key] = name
        inner = config.get("text_config")
        for where in (config, inner if isinstance(inner, dict) else {}):
            if "vocab_size" in where:
                where["vocab_size"] = text.vocab_size
        if self._skeleton_is_tied() != self.merged.tied or "tie_word_embeddings" in config:
            config["tie_word_embeddings"] = self.merged.tied
        return config

    def _skeleton_is_tied(self) -> bool:
        model = self._skeleton
        return bool(model.get_input_embeddings().weight is model.get_output_embeddings().weight)

    def _generation(self, config: dict[str, Any], ends: Sequence[int]) -> dict[str, Any]:
        source = self.merged.source
        path = _base_folder(source) / GENERATION
        settings: dict[str, Any] = {}
        if source.format == "safetensors" and path.is_file():
            try:
                settings = dict(read_json(path))
            except (OSError, ValueError, TypeError) as error:
                raise ModelError(f"{path} cannot be read: {reason(error)}.") from error
        else:
            for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
                if config.get(key) is not None:
                    settings[key] = config[key]
        settings.pop("transformers_version", None)
        named = settings.get("eos_token_id", config.get("eos_token_id"))
        stated = [named] if isinstance(named, int) else named
        stated = [i for i in stated if isinstance(i, int)] if isinstance(stated, list) else []
        both = list(dict.fromkeys([*stated, *ends]))
        if both:
            settings["eos_token_id"] = both[0] if len(both) == 1 else both
        return settings


def _base_folder(source: ModelSource) -> Path:
    return source.checkpoint.files()[0].parent


def _shards(planned: Sequence[Planned], most: int) -> list[list[Planned]]:
    """In order, as many together as ``most`` bytes hold (at least one)."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for one in planned:
        if shards[-1] and size + one.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(one)
        size += one.nbytes
    return shards


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
