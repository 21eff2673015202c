"""LoRA+ (Hayou et al., 2024, arXiv 2402.12354): B learns at a higher rate than A.

With one rate for both, a wide layer's B moves too little: the paper's theorem 1 has the rate of A
fall with the width n as 1/n and that of B stay.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from halfbyte.recipe.schema import TrainingRecipe


def rate_factors(named: Mapping[str, Tensor], training: TrainingRecipe) -> dict[str, float]:
    """By what the learning rate of each trained parameter is multiplied; empty without LoRA+.

    ``training.loraplus_lr_ratio`` for B and for vectors (DoRA's magnitudes), 1 for all else, as
    PEFT's ``create_loraplus_optimizer`` has it.
    """
    ratio = training.loraplus_lr_ratio
    if ratio is None:
        return {}
    fast = {name for name, p in named.items() if name.endswith("lora_B") or p.dim() == 1}
    return {name: float(ratio) if name in fast else 1.0 for name in named}
