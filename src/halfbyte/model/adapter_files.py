"""An adapter on disk, in PEFT's format.

``adapter_model.safetensors`` holds ``base_model.model.<layer>.lora_A.weight`` [r, in] and
``….lora_B.weight`` [out, r], with DoRA also ``….lora_magnitude_vector`` [out]; then what is trained
of embedding and head, ``<module>.weight`` whole or the rows of new tokens as
``<module>.token_adapter.trainable_tokens_delta``. ``adapter_config.json`` says what they are. PEFT
reads these two files; vLLM and llama.cpp's converter do where there is nothing but A and B.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import ModelError
from halfbyte.foreign_json import read_json
from halfbyte.model.wording import reason

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_SUFFIXES = (".lora_A.weight", ".lora_B.weight")
_MAGNITUDE = ".lora_magnitude_vector"
_TOKENS = ".token_adapter.trainable_tokens_delta"
_WEIGHT = ".weight"
# Of a module that is saved whole PEFT keeps several copies where the vocabulary was extended.
_TRAINED_COPY, _OLD_COPY = ".modules_to_save.weight", ".original_module.weight"
_BASE_WEIGHT = ".base_layer.weight"  # of a head or an embedding that has an adapter
_OF_EMBEDDING = ".lora_embedding_A"
# What PEFT saves whole, without being asked to, where the vocabulary was extended.
_ENDS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
# Settings with which an adapter is more, or something else, than B·A beside a layer.
_OTHER_KINDS = (
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
)
# With these PEFT changes the base's weights when it begins, and again whenever it loads.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")
# Of what is read of a configuration, what it may be.
_KINDS: dict[str, type | tuple[type, ...]] = {
    "modules_to_save": list,
    "trainable_token_indices": (list, dict),
    "use_dora": bool,
}


@dataclass(frozen=True)
class SavedAdapter:
    """What an adapter folder holds."""

    layers: dict[str, tuple[Tensor, Tensor]]  # layer's full name: A [r, in], B [out, r]
    config: dict[str, Any]  # adapter_config.json
    magnitudes: dict[str, Tensor] = field(default_factory=dict)  # layer's full name: [out]
    modules: dict[str, Tensor] = field(default_factory=dict)  # module's: weight [vocabulary, H]
    token_rows: dict[str, Tensor] = field(default_factory=dict)  # module's: rows [tokens, H]

    def token_ids(self) -> dict[str, list[int]]:
        """The tokens whose rows were trained apart, by the full name of their module.

        Raises ModelError where the configuration does not say them for a module that has rows.
        """
        named = self.config.get("trainable_token_indices") or {}
        found = {}
        for name, rows in self.token_rows.items():
            ids = named
            if isinstance(named, dict):
                ids = named.get(name, named.get(_leaf(name)))
            if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
                raise ModelError(f"{CONFIG} does not say of which tokens the rows of {name} are.")
            if rows.dim() != 2 or len(ids) != len(rows) or not ids:
                raise ModelError(
                    f"{CONFIG} names {len(ids)} tokens of {name}, which has {len(rows)}."
                )
            found[name] = ids
        return found


def save_adapter(
    folder: Path,
    layers: dict[str, tuple[Tensor, Tensor]],
    *,
    base_name: str,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    target_modules: list[str],
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_dora: bool = False,
    magnitudes: Mapping[str, Tensor] | None = None,
    modules: Mapping[str, Tensor] | None = None,
    token_rows: Mapping[str, Tensor] | None = None,
    token_ids: Mapping[str, list[int]] | None = None,
    ensure_weight_tying: bool = False,
) -> None:
    """Write the adapter into ``folder``, which is made if need be.

    The settings have PEFT's names. Each file is written under another name and renamed, so that
    none is ever half there; the weights come first, since a folder with a configuration counts as
    an adapter.
    """
    from safetensors.torch import save_file

    tensors = {}
    for name, pair in layers.items():
        for suffix, tensor in zip(_SUFFIXES, pair, strict=True):
            tensors[f"{_PREFIX}{name}{suffix}"] = tensor.detach().cpu().contiguous()
    for name, vector in (magnitudes or {}).items():
        tensors[f"{_PREFIX}{name}{_MAGNITUDE}"] = vector.detach().cpu().contiguous()
    for name, weight in (modules or {}).items():
        tensors[f"{_PREFIX}{name}{_WEIGHT}"] = weight.detach().to("cpu", copy=True).contiguous()
    for name, rows in (token_rows or {}).items():
        tensors[f"{_PREFIX}{name}{_TOKENS}"] = rows.detach().cpu().contiguous()
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": None,
        "r": r,
        "lora_alpha": _short(lora_alpha),
        "lora_dropout": lora_dropout,
        "target_modules": target_modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": [_leaf(name) for name in modules] if modules else None,
        "trainable_token_indices": (
            {_leaf(name): ids for name, ids in token_ids.items()} if token_ids else None
        ),
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": dict(rank_pattern or {}),
        "alpha_pattern": {key: _short(value) for key, value in (alpha_pattern or {}).items()},
        "use_dora": use_dora,
        "use_rslora": use_rslora,
    }
    if ensure_weight_tying:  # a setting of PEFT's that its older versions do not know
        config["ensure_weight_tying"] = True
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{WEIGHTS}.partial"
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        os.replace(partial, folder / WEIGHTS)
        partial = folder / f".{CONFIG}.partial"
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / CONFIG)
    finally:
        partial.unlink(missing_ok=True)


def _short(value: float) -> float:
    """A whole number as one: PEFT's configuration has it so."""
    return int(value) if float(value).is_integer() else value


def read_adapter(folder: Path) -> SavedAdapter:
    """The adapter in ``folder``, tensors on the CPU as stored.

    Raises ModelError for a missing or damaged file, for pickled weights, and for an adapter that
    is neither LoRA nor DoRA, or is not one of linear layers on a base model as it is.
    """
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    magnitudes = _taken(tensors, _MAGNITUDE, None)
    token_rows = _taken(tensors, _TOKENS, None)
    modules = _modules(tensors, config.get("modules_to_save") or ())
    if any(key.endswith(_OF_EMBEDDING) for key in tensors):
        raise ModelError(
            f"the adapter in {folder} has low-rank matrices of the embedding, which halfbyte does "
            "not read; merge it with PEFT's merge_and_unload."
        )
    for key in tensors:
        if not key.startswith(_PREFIX) or not key.endswith(_SUFFIXES):
            raise ModelError(
                f"{folder / WEIGHTS} holds {key}, which no LoRA adapter has, so it cannot be read."
            )
        name = key.removeprefix(_PREFIX).removesuffix(_SUFFIXES[0]).removesuffix(_SUFFIXES[1])
        a, b = (tensors.get(f"{_PREFIX}{name}{suffix}") for suffix in _SUFFIXES)
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise ModelError(
                f"the two matrices of {name} in {folder / WEIGHTS} do not fit each other: the "
                "adapter is damaged."
            )
        layers[name] = (a, b)
    if not layers:
        raise ModelError(f"{folder / WEIGHTS} holds no adapter: it is empty.")
    if config.get("use_dora") and magnitudes.keys() != layers.keys():
        raise ModelError(
            f"{folder / WEIGHTS} does not hold the magnitude vectors that {CONFIG} speaks of: the "
            "adapter is damaged."
        )
    return SavedAdapter(layers, config, magnitudes, modules, token_rows)


def _modules(tensors: dict[str, Tensor], asked: Collection[object]) -> dict[str, Tensor]:
    """Take the weights of modules that are saved whole: those that PEFT was asked for, which it
    knows by the ends of their names, and embedding and head."""
    _taken(tensors, _OLD_COPY, None)
    bases = _taken(tensors, _BASE_WEIGHT, _ENDS)
    found = _taken(tensors, _TRAINED_COPY, None)
    ends = tuple(name for name in asked if isinstance(name, str) and name)
    for key in list(tensors):
        name = key.removeprefix(_PREFIX).removesuffix(_WEIGHT)
        if key != f"{_PREFIX}{name}{_WEIGHT}" or key.endswith(_SUFFIXES):
            continue
        if _leaf(name) in _ENDS or name.endswith(ends or "\0"):
            found[name] = tensors.pop(key)
    return bases | found


def _taken(
    tensors: dict[str, Tensor], suffix: str, leaves: Collection[str] | None
) -> dict[str, Tensor]:
    """Take the tensors with ``suffix`` of modules whose last names are ``leaves`` (None: any)."""
    found = {}
    for key in list(tensors):
        name = key.removeprefix(_PREFIX).removesuffix(suffix)
        if key == f"{_PREFIX}{name}{suffix}" and (leaves is None or _leaf(name) in leaves):
            found[name] = tensors.pop(key)
    return found


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = read_json(path)
    except FileNotFoundError as error:
        raise ModelError(f"{folder} holds no adapter: {CONFIG} is missing.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {reason(error)}.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        other = f" but of {_shown(kind)}" if kind is not None else ""
        raise ModelError(
            f"{path} is not of a LoRA adapter{other}, and halfbyte reads no other kind."
        )
    for key, kinds in _KINDS.items():
        value = config.get(key)
        if value is not None and not isinstance(value, kinds):
            raise ModelError(f"{path} has {key} = {_shown(value)}, which PEFT does not take.")
    odd = [key for key in _OTHER_KINDS if config.get(key)]
    if config.get("bias", "none") != "none":
        odd.append("bias")
    if odd:
        raise ModelError(f"{path} sets {', '.join(odd)}, which halfbyte's adapters do not have.")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGES_BASE):
        raise ModelError(
            f"{path} has init_lora_weights = {_shown(init)}: the adapter belongs to what that left "
            "of its base model; save it for the base as it is, with PEFT's "
            "path_initial_model_for_weight_conversion."
        )
    return config


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    try:
        return load_file(path)
    except FileNotFoundError as error:
        pickled = "adapter_model.bin"
        if (folder / pickled).exists():
            raise ModelError(
                f"the adapter in {folder} is pickled ({pickled}), which can run code when read; "
                "save it as safetensors."
            ) from error
        raise ModelError(f"{folder} holds no adapter: {WEIGHTS} is missing.") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is damaged or was cut off ({reason(error)}): save it again."
        ) from error
