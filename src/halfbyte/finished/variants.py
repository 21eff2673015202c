"""The states of an adapter that can be asked: none, at each checkpoint, at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from halfbyte.checkpoint.files import ADAPTER, checkpoints_in, load_checkpoint
from halfbyte.errors import RunError
from halfbyte.events import read_events
from halfbyte.events.types import Kept
from halfbyte.finished.found import FoundAdapter
from halfbyte.finished.opened import OpenedAdapter

BASE, FINAL = "base", "adapter"


def variant_names(found: FoundAdapter) -> list[str]:
    """``base``, ``step-N`` of each checkpoint that the run kept, ``adapter``."""
    steps = checkpoints_in(found.run / "checkpoints") if found.run is not None else []
    return [BASE, *(path.name for path in steps), FINAL]


def states(found: FoundAdapter) -> list[str]:
    """Those of ``variant_names`` that differ: without the checkpoint of the step that was kept."""
    events = read_events(found.run) if found.run is not None else []
    kept = [r.event.step for r in events if isinstance(r.event, Kept)]
    return [name for name in variant_names(found) if name not in {f"step-{n}" for n in kept[-1:]}]


@contextmanager
@torch.no_grad()
def use_variant(opened: OpenedAdapter, name: str) -> Iterator[None]:
    """With that variant in the model while the context lasts.

    Raises RunError for a name that is none of ``variant_names``, and where the checkpoint is
    damaged.
    """
    names = variant_names(opened.found)
    if name not in names:
        raise RunError(f"{opened.folder} has no variant {name}; it has {', '.join(names)}.")
    if name == BASE:
        with opened.qlora.adapter_on(False):
            yield
        return
    if name == FINAL:
        yield
        return
    assert opened.found.run is not None
    _, tensors = load_checkpoint(opened.found.run / "checkpoints" / name)
    now = opened.qlora.lora_parameters()
    missing = [key for key in now if f"{ADAPTER}{key}" not in tensors]
    if missing:
        raise RunError(f"the checkpoint {name} of {opened.folder} lacks {missing[0]}.")
    before = {key: parameter.detach().clone() for key, parameter in now.items()}
    _put(opened, {key: tensors[f"{ADAPTER}{key}"] for key in now})
    try:
        yield
    finally:
        _put(opened, before)


@torch.no_grad()
def _put(opened: OpenedAdapter, values: dict[str, torch.Tensor]) -> None:
    for key, parameter in opened.qlora.lora_parameters().items():
        parameter.copy_(values[key])
    opened.qlora.adapter_changed()
