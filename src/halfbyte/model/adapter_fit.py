"""Whether an adapter is one of a base model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.errors import ModelError
from halfbyte.model.lora_init import Pair
from halfbyte.model.skeleton import quantized_linears
from halfbyte.model.wording import some

OTHER_BASE = "it is an adapter of another base model; name the right one with --base"


def adaptable_shapes(skeleton: Any) -> dict[str, tuple[int, int]]:
    """(out, in) of each layer that an adapter may be of, by its full name: the linear layers and
    the output head."""
    linears, head = quantized_linears(skeleton), skeleton.get_output_embeddings()
    linears |= {name: head for name, module in skeleton.named_modules() if module is head}
    return {name: (module.out_features, module.in_features) for name, module in linears.items()}


def require_layers_fit(
    layers: Mapping[str, Pair], shapes: Mapping[str, tuple[int, int]], which: str, base: str
) -> None:
    """Raise ModelError unless each A [r, in] and B [out, r] is of a layer that there is.

    ``which`` and ``base`` are what to call the adapter and the base model.
    """
    strange = [name for name in layers if name not in shapes]
    if strange:
        raise ModelError(
            f"the adapter {which} is of {some(strange)}, which {base} does not have or halfbyte "
            f"does not adapt: {OTHER_BASE}."
        )
    for name, (a, b) in layers.items():
        if (len(b), a.shape[1]) != shapes[name]:
            out_features, in_features = shapes[name]
            raise ModelError(
                f"the adapter {which} is of a {name} of {len(b)} × {a.shape[1]} weights, and that "
                f"of {base} has {out_features} × {in_features}: {OTHER_BASE}."
            )
