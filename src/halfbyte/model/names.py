"""What transformers calls the tensors of a checkpoint."""

from __future__ import annotations

import re
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


def expert_keys(model: Any, keys: Iterable[str]) -> dict[str, dict[int, list[str]]]:
    """Parameters of ``model`` that hold all experts of a layer, where a checkpoint has each apart.

    Of each expert by its number it gives, in their order, the keys whose matrices lie one upon
    another in the parameter (the gate's above the other factor's). transformers' own table says
    which they are; what it does otherwise than stack and join them is left alone.
    """
    keys = list(keys)
    own = model.state_dict()
    if all(key in own for key in keys):
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    table = get_model_conversion_mapping(model)
    renamings = [r for r in table if isinstance(r, WeightRenaming)]
    converters = [c for c in table if isinstance(c, WeightConverter)]
    patterns = {p: n for c in converters if _stacks(c) for n, p in enumerate(c.source_patterns)}
    found: dict[str, dict[int, dict[int, str]]] = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
        if pattern in patterns and name in own:
            expert = int(re.findall(r"\.(\d+)\.", key)[-1])
            found.setdefault(name, {}).setdefault(expert, {})[patterns[pattern]] = key
    return {
        name: {expert: [parts[n] for n in sorted(parts)] for expert, parts in experts.items()}
        for name, experts in found.items()
    }


def _stacks(converter: Any) -> bool:
    """Whether it joins the matrices of an expert, if there are several, and stacks all experts'."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    return steps[:1] == [("MergeModulelist", 0)] and steps[1:] in ([], [("Concatenate", 1)])


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
