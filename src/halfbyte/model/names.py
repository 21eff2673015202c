"""What transformers calls the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


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
