"""The model card beside an adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence

from halfbyte.events.types import Audited, Evaluated, Kept, ModelLoaded
from halfbyte.recipe import Recipe
from halfbyte.recipe.subject import is_medical


def model_card(
    recipe: Recipe,
    *,
    model: ModelLoaded,
    audit: Audited,
    evaluations: list[Evaluated],
    kept: Kept | None,
    version: str,
    notes: Sequence[str] = (),
) -> str:
    """Markdown with the hub's metadata: base, data, settings, results, limits, licences.

    ``notes`` are what must be known to load the adapter.
    """
    title = recipe.title or f"{model.name}, fine-tuned with QLoRA"
    last = {e.what: e for e in evaluations}
    if kept is not None and kept.held_out_loss is not None:
        of_kept = [e for e in evaluations if e.what == "adapter" and e.step == kept.step]
        last.update({"adapter": of_kept[-1]} if of_kept else {})
    results = [
        f"| {what} | {last[what].loss:.4f} |"
        for what in ("base", "quantized base", "adapter")
        if what in last
    ]
    lines = [
        "---",
        f"base_model: {json.dumps(model.name)}",
        "library_name: peft",
        "pipeline_tag: text-generation",
        *([f"license: {json.dumps(model.licence)}"] if model.licence else []),
        "tags: [lora, qlora, halfbyte]",
        "---",
        "",
        f"# {title}",
        "",
        *([recipe.objective.strip(), ""] if recipe.objective else []),
        f"A LoRA adapter for `{model.name}`, trained with halfbyte {version} on 4-bit NF4 weights.",
        "",
        "| | |",
        "| --- | --- |",
        f"| base model | {model.name} ({model.parameters_base:,} parameters, frozen) |",
        f"| licence of the base | {model.licence or 'not stated in its files'} |",
        f"| trained parameters | {model.parameters_trainable:,} |",
        f"| data | {audit.source}, {audit.rows_used:,} rows, loss on {audit.loss_on} |",
        "| licence of the data | see its source |",
        f"| adapter | r {recipe.lora.r}, alpha {recipe.lora.lora_alpha}, dropout "
        f"{recipe.lora.lora_dropout}, on {', '.join(model.lora_modules)} |",
        f"| seed | {recipe.seed} |",
        *([f"| kept | step {kept.step}: {kept.why} |"] if kept else []),
        "",
    ]
    if results:
        rows = next(iter(last.values())).rows
        lines += [
            f"Loss on {rows:,} held-out rows (nats per token that carries loss):",
            "",
            "| model | loss |",
            "| --- | --- |",
            *results,
            "",
        ]
    lines += [
        "The format that was trained is in `chat_template.jinja`: prompt the adapter with it.",
        "",
        *(line for note in notes for line in (note, "")),
        "## Limits",
        "",
        "The adapter learned the form and content of its training rows, their errors included. "
        "Held-out loss says how well it predicts rows like them; it is no measure of truth or "
        "safety. Judge the answers before relying on them.",
        "",
    ]
    if is_medical(f"{audit.source} {recipe.objective or ''}"):
        lines += [
            "**This model gives no medical advice** and must not be used in place of a doctor.",
            "",
        ]
    return "\n".join(lines)
