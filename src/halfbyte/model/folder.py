"""The configuration and the licence of a transformers model folder; no code of it is run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from halfbyte.errors import ModelError
from halfbyte.foreign_json import read_json, read_small
from halfbyte.model.bnb_checkpoint import METHOD, quantization_method
from halfbyte.model.plausible import require_plausible
from halfbyte.model.wording import reason

# Characters: the front matter of a model card is a page at most.
_LONGEST_FRONT = 100_000


def read_config(folder: Path, name: str) -> Any:
    """The transformers config in ``folder``.

    Raises ModelError where there is none, where transformers knows no causal language model of
    that architecture (code that comes with a model is never run), and where the checkpoint is
    quantized already in another way than bitsandbytes' NF4.
    """
    path = folder / "config.json"
    try:
        raw = read_json(path)
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder} holds no config.json: name the folder of a transformers model, a GGUF file "
            "or a model on the hub."
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {reason(error)}.") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path} is not a model's configuration: it holds no JSON object.")
    _require_known(raw, name)
    require_plausible(raw, str(path))

    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds, each about the file's content
        raise ModelError(
            f"{path} is not a configuration that transformers takes: {reason(error)}."
        ) from (error)
    # Weights in NF4 say so themselves, and transformers would want to load them its own way.
    config.__dict__.pop("quantization_config", None)
    return require_causal_lm(config, name)


def require_causal_lm(config: Any, name: str) -> Any:
    """``config`` if transformers has a causal language model for it, else ModelError."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{name} is a {config.model_type!r} model, of which transformers has no causal "
            "language model: choose a model that generates text."
        )
    return config


def _require_known(raw: dict[str, Any], name: str) -> None:
    from transformers import CONFIG_MAPPING

    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own_code = (
            " (it comes with code of its own, which is never run)" if "auto_map" in raw else ""
        )
        raise ModelError(
            f"transformers does not know the architecture {kind!r} of {name}{own_code}; update "
            "transformers or choose another model."
        )
    settings = raw.get("quantization_config")
    if settings and quantization_method(settings) != METHOD:
        raise ModelError(
            f"the weights of {name} are quantized already ({quantization_method(settings)}), and "
            "only full-precision checkpoints, GGUF files and what bitsandbytes has stored in NF4 "
            "are read: name the model's original."
        )


def read_licence(folder: Path) -> str | None:
    """The licence in the front matter of the folder's README.md, if it says one."""
    import yaml

    try:
        text = read_small(folder / "README.md").decode("utf-8")
    except (OSError, ValueError):
        return None
    front = re.match(r"\A\s*---[ \t]*\n(.*?)\n---[ \t]*(\n|\Z)", text, re.DOTALL)
    if front is None or len(front[1]) > _LONGEST_FRONT:
        return None
    try:
        fields = yaml.safe_load(front[1])
    except (yaml.YAMLError, ValueError, RecursionError):  # a date that is none is a ValueError
        return None
    if not isinstance(fields, dict):
        return None
    licence = fields.get("license")
    if licence == "other":
        licence = fields.get("license_name") or licence
    return licence if isinstance(licence, str) else None
