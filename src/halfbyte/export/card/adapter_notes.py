"""What somebody who loads an adapter must know of it, where it is not plain LoRA."""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.model.new_tokens import NewTokens
from halfbyte.recipe import Recipe


def adapter_notes(
    recipe: Recipe, new_tokens: NewTokens | None, mistaken: Sequence[str] = ()
) -> list[str]:
    """Sentences for the model card; none for plain LoRA.

    ``mistaken`` are those of :func:`halfbyte.model.experts.mistaken_for_experts`.
    """
    lora, found = recipe.lora, []
    if new_tokens is not None and new_tokens.rows > new_tokens.old_rows:
        found.append(
            f"It has {new_tokens.count} new tokens: take the tokenizer of this folder, and call "
            f"`base.resize_token_embeddings({new_tokens.rows})` before the adapter is loaded."
        )
    if lora.init.startswith("pissa"):
        found.append(
            "It was trained with PiSSA and is saved for the base model as it is, at twice the "
            "trained rank: the other half takes away what it started from. On the base in 4 bits "
            "its answers may differ a little from those of the run, whose 4-bit weights were "
            "others."
        )
    if lora.init == "loftq":
        found.append(
            "It was trained with LoftQ and makes good what 4 bits lose: load the base model in "
            f"NF4, in blocks of {recipe.quantization.block_size} weights."
        )
    if mistaken:
        found.append(
            f"It has adapters of layers beside the experts, named {', '.join(mistaken)}, which "
            "PEFT takes for the experts' own in most such models and then leaves out: compare its "
            "answers with those of the run before you rely on what PEFT loads."
        )
    kinds = ["DoRA"] if lora.use_dora else []
    if lora.modules_to_save or new_tokens is not None:
        kinds.append("trained embeddings")
    if kinds:
        found.append(
            f"PEFT loads it. Servers that know LoRA alone do not take {' and '.join(kinds)}: merge "
            "it into the base model first (`merge_and_unload` in PEFT)."
        )
    return found
