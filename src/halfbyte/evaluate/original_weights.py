"""A model's weights as they were before they were rounded to 4 bits, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from halfbyte.kernels.dora_linear import row_squares
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.experts import NF4Experts, expert_name


@contextmanager
def original_weights(model: QLoRAModel, read: Callable[[str], Tensor]) -> Iterator[None]:
    """With the original weights in the place of those in 4 bits while the context lasts.

    ``read(name)`` gives an original tensor. Each linear layer gets its own just before it runs and
    loses it after, and each expert when tokens come to it, so that one of them is in memory at a
    time. The adapter stays beside them; of PiSSA's weights its start is taken out, as it was when
    they were rounded, since it stands beside them too.
    """
    kept = {name: (layer.dense, layer.row_squares) for name, layer in model.linears.items()}
    hooks = []
    for name, layer in model.linears.items():

        def before(layer: Any, _: Any, name: str = name) -> None:
            weight = read(f"{name}.weight").to(layer.base.device)
            if layer.initial is not None:
                a, b = layer.initial
                weight = weight.float() - layer.scale * (b @ a)
            layer.dense = weight.to(layer.compute_dtype)
            if layer.lora_magnitude_vector is not None:
                layer.row_squares = row_squares(layer.dense)

        def after(layer: Any, *_: Any, squares: Tensor | None = layer.row_squares) -> None:
            layer.dense, layer.row_squares = None, squares

        hooks += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    mixtures = {n: m for n, m in model.network.named_modules() if isinstance(m, NF4Experts)}
    for name, module in mixtures.items():

        def original(which: str, expert: int, name: str = name, module: Any = module) -> Tensor:
            weight = read(expert_name(f"{name}.{which}", expert))
            return weight.to(model.device, module.compute_dtype)

        module.original = original
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in mixtures.values():
            module.original = None
        for name, layer in model.linears.items():
            layer.dense, layer.row_squares = kept[name]
