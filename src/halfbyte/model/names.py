"""What transformers calls the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Divisors of rotary frequencies, which are settings and not a parameter in transformers.
GGUF_ROPE_FACTORS = "rope_freqs.weight"


def parameter_names(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Name in ``model`` (a transformers model): key in the checkpoint.

    Most checkpoints use the model's own names. For the others transformers keeps a table of
    renamings by architecture, and it adds or drops the decoder's prefix (``model.``) where a
    checkpoint was saved from the decoder alone; both are applied here as it applies them. A key
    that the model does not know keeps its name.
    """
    keys = list(keys)
    own = model.state_dict()
    if all(key in own for key in keys):
        return {key: key for key in keys}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    prefix = model.base_model_prefix
    found: dict[str, str] = {}
    for key in sorted(keys):
        name, _ = rename_source_key(key, renamings, [], prefix, own)
        found.setdefault(name, key)
    return found


def gguf_parameter_names(model: Any, architecture: str, keys: Iterable[str]) -> dict[str, str]:
    """Name in ``model`` (a transformers model): tensor's name in a GGUF file.

    The ``gguf`` package knows what llama.cpp calls each. A key that the model does not know keeps
    its name.
    """
    import gguf

    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    table = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    there = [key for key in keys if key != GGUF_ROPE_FACTORS]
    theirs = {n: table.get_name(n, try_suffixes=(".weight", ".bias")) for n in model.state_dict()}
    found = {name: key for name, key in theirs.items() if key in set(there)}
    return found | {key: key for key in there if key not in set(found.values())}
