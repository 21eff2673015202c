"""halfbyte fine-tunes large language models with QLoRA: one recipe, one command, one report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.recipe import Recipe
    from halfbyte.run import Run, train

__version__ = "0.1.0"
__all__ = ["Recipe", "Run", "train"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import halfbyte` and the command line's --help do not import torch.
    if name == "Recipe":
        from halfbyte.recipe import Recipe

        return Recipe
    if name in ("Run", "train"):
        from halfbyte import run

        return getattr(run, name)
    raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
