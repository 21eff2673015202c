"""A finished run's model, ready to answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import ModelError, RunError
from halfbyte.foreign_json import read_small
from halfbyte.model.adapter_files import read_adapter
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.source import open_model
from halfbyte.model.tokenizer import LONGEST_TEMPLATE, require_usable
from halfbyte.model.wording import reason
from halfbyte.plan.device import find_device
from halfbyte.recipe.load import load_recipe
from halfbyte.run.adapter_start import put_saved
from halfbyte.run.folder import require_run
from halfbyte.run.setup import load_model


@dataclass(frozen=True)
class Answerer:
    """A base model with a run's adapter and the tokenizer with the template that was trained."""

    folder: Path
    qlora: QLoRAModel
    tokenizer: Any

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.qlora.network


def load_for_inference(folder: Path, device: str = "auto") -> Answerer:
    """The model of the run in ``folder`` with its saved adapter.

    Raises RunError where the folder holds no run or no adapter yet, ModelError where the adapter
    does not fit the base model.
    """
    require_run(folder)
    if not (folder / "adapter" / "adapter_config.json").exists():
        raise RunError(
            f"{folder} holds no adapter yet; go on with halfbyte train --resume {folder}."
        )
    recipe = load_recipe(folder / "recipe.yaml")
    on = find_device(device)
    if on.kind == "cpu" and recipe.precision != "fp32" and not on.bf16_native:
        recipe = recipe.model_copy(update={"precision": "fp32"})
    source = open_model(recipe.model)
    qlora, _ = load_model(recipe, source, on, begun=folder)
    saved = read_adapter(folder / "adapter")
    if saved.layers.keys() != qlora.lora.keys():
        raise ModelError(f"the adapter in {folder} is not one of {recipe.model.name}'s layers.")
    put_saved(qlora, saved)
    qlora.network.eval()
    template = folder / "adapter" / "chat_template.jinja"
    try:
        written = read_small(template, 4 * LONGEST_TEMPLATE).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{template} cannot be read: {reason(error)}.") from error
    source.tokenizer.chat_template = written
    require_usable(source.tokenizer, f"the adapter in {folder}")
    return Answerer(folder, qlora, source.tokenizer)
