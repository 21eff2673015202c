"""The model card beside an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from halfbyte.events.types import Audited, Evaluated, Kept, ModelLoaded
from halfbyte.export.card.licence import NOT_STATED, data_licences, licence_fields
from halfbyte.export.card.loading import Kind, loading_lines
from halfbyte.export.card.results import (
    evaluation_lines,
    held_out_losses,
    loss_lines,
    model_index,
)
from halfbyte.export.card.text import code, escape, fenced, front_matter, hub_name, public_name
from halfbyte.export.card.text import table as markdown_table
from halfbyte.recipe import Recipe
from halfbyte.recipe.subject import is_medical

# What of a recipe says how the adapter came to be; the rest is of the machine, or of the report.
_TOLD = ("seed", "precision", "model", "data", "quantization", "lora", "training", "evaluation")

NOTES = "## Before it is loaded"

_WHAT = {
    "adapter": "A LoRA adapter for {base}",
    "combination": "A LoRA adapter for {base}, made of others with halfbyte {version}",
    "merge": "{base} with a LoRA adapter merged into its weights by halfbyte {version}",
    "quantized": "{base} with a LoRA adapter, written for llama.cpp (GGUF) by halfbyte {version}",
    "compressed": "{base} with a LoRA adapter, written for vLLM by halfbyte {version}",
    "mlx": "{base} with a LoRA adapter, written for MLX by halfbyte {version}",
}
# As the hub has them (hub docs, "Model cards", base_model_relation). A model with its adapter
# merged in is a fine-tuned one there: "merge" is said of several models made one.
_RELATION = {
    "adapter": "adapter",
    "combination": "adapter",
    "merge": "finetune",
    "quantized": "quantized",
    "compressed": "quantized",
    "mlx": "quantized",
}
_LIBRARY = {
    "adapter": "peft",
    "combination": "peft",
    "merge": "transformers",
    "quantized": "gguf",
    "compressed": "transformers",
    "mlx": "mlx",
}
_TAGS: dict[Kind, list[str]] = {
    "quantized": ["gguf"],
    "compressed": ["compressed-tensors"],
    "mlx": ["mlx"],
}


def model_card(
    recipe: Recipe,
    *,
    model: ModelLoaded,
    audit: Audited,
    evaluations: list[Evaluated],
    kept: Kept | None,
    version: str,
    notes: Sequence[str] = (),
    run: Path | None = None,
    kind: Kind = "adapter",
    facts: Mapping[str, str] | None = None,
    place: str | None = None,
    file: str | None = None,
) -> str:
    """Markdown with the hub's metadata: base, data, recipe, results, use, limits, licences.

    ``notes`` are what must be known to load the adapter. ``run`` is the run folder, where an
    evaluation may lie. ``kind`` is what the card stands beside, ``facts`` what else is told of it,
    ``place`` the repository it goes to, ``file`` the GGUF file. Names of data and models become
    text alone, of paths only the last part is told, and secrets are hidden.
    """
    short = public_name(model.name)
    title = recipe.title or f"{short.rpartition('/')[2]}, fine-tuned with QLoRA"
    losses = held_out_losses(evaluations, kept)
    sources = recipe.data.all_sources
    pairs = [
        ("base model", f"{escape(short)} ({model.parameters_base:,} parameters, frozen)"),
        ("trained parameters", f"{model.parameters_trainable:,}"),
        (
            "data",
            f"{escape(', '.join(public_name(s.path) for s in sources))}, {audit.rows_used:,} rows, "
            f"loss on {escape(audit.loss_on)}",
        ),
        ("format", f"the template {code(audit.template)}"),
        (
            "adapter",
            f"{_kind_of_lora(recipe)}r {recipe.lora.r}, alpha {recipe.lora.lora_alpha}, dropout "
            f"{recipe.lora.lora_dropout}, on {escape(', '.join(model.lora_modules))}",
        ),
        ("seed", str(recipe.seed)),
        *([("kept", f"step {kept.step}: {escape(kept.why)}")] if kept else []),
    ]
    subject = " ".join(filter(None, (audit.source, recipe.title, recipe.objective)))
    return assemble(
        kind,
        title=title,
        base=model.name,
        datasets=[name for s in sources if (name := hub_name(s.path))],
        index=model_index(title, recipe, losses),
        licence=model.licence,
        data_licence=data_licences(recipe.data),
        objective=recipe.objective,
        pairs=[*pairs, *_fact_pairs(facts)],
        notes=notes,
        loading=loading_lines(kind, model.name, recipe.quantization, place, file),
        results=[*loss_lines(losses), *([] if run is None else evaluation_lines(run))],
        recipe=_recipe_lines(recipe),
        medical=is_medical(subject),
        trained_with=version,
        version=version,
    )


def assemble(
    kind: Kind,
    *,
    title: str,
    base: str,
    datasets: Sequence[str],
    index: list[dict[str, Any]] | None,
    licence: str | None,
    data_licence: str | None,
    objective: str | None,
    pairs: Sequence[tuple[str, str]],
    notes: Sequence[str],
    loading: Sequence[str],
    results: Sequence[str],
    recipe: Sequence[str],
    medical: bool,
    trained_with: str | None,
    version: str,
) -> str:
    """A card of its parts; ``pairs``, ``loading``, ``results`` and ``recipe`` are Markdown.

    ``trained_with`` is the version of halfbyte that trained it, None where something else did.
    """
    qlora = ["qlora"] if trained_with is not None else []
    metadata = {
        "base_model": hub_name(base),
        "base_model_relation": _RELATION[kind] if hub_name(base) else None,
        "library_name": _LIBRARY[kind],
        "pipeline_tag": "text-generation",
        **licence_fields(licence),
        "datasets": list(datasets),
        "tags": [*_TAGS.get(kind, []), "lora", *qlora, "halfbyte"],
        "model-index": index,
    }
    what = _WHAT[kind].format(base=code(public_name(base)), version=escape(version))
    if trained_with is not None:
        what += f"; trained with halfbyte {escape(trained_with)} on 4-bit NF4 weights"
    trained = "adapter" if kind in ("adapter", "combination") else "model"
    template = "The format that was trained is in `chat_template.jinja`: prompt it with that."
    if kind == "quantized":
        template = "The format that was trained is the file's chat template: prompt it with that."
    lines = [
        *front_matter(metadata),
        f"# {escape(title)}",
        "",
        f"{what}.",
        "",
        *_medical(medical),
        *markdown_table(("", ""), pairs),
        "## How to load it",
        "",
        *loading,
        template,
        "",
        *([NOTES, "", *(line for note in notes for line in (note, ""))] if notes else []),
        *(["## Results", "", *results] if results else []),
        *(["## How it was trained", "", *recipe] if recipe else []),
        "## Intended use",
        "",
        escape(objective) if objective else "Whoever made it has stated none.",
        "",
        "## Limits",
        "",
        f"The {trained} learned the form and content of its training rows, their errors included. "
        "Held-out loss says how well it predicts rows like them; it is no measure of truth or "
        "safety. Nothing was measured on other subjects, languages and forms of prompt. What the "
        "base model does wrong, it may do as well. Judge the answers before relying on them.",
        "",
        "## Licences",
        "",
        f"Of the base model: {escape(licence or NOT_STATED)}. Of the data: "
        f"{escape(data_licence or NOT_STATED)}. What they ask is asked of this {trained} too.",
        "",
    ]
    return "\n".join(lines)


def _medical(medical: bool) -> list[str]:
    if not medical:
        return []
    return ["**This model gives no medical advice** and must not be used in place of a doctor.", ""]


def _fact_pairs(facts: Mapping[str, str] | None) -> list[tuple[str, str]]:
    return [(escape(name), escape(value)) for name, value in (facts or {}).items()]


def _kind_of_lora(recipe: Recipe) -> str:
    kinds = {"rsLoRA": recipe.lora.use_rslora, "DoRA": recipe.lora.use_dora}
    named = [name for name, is_so in kinds.items() if is_so]
    return f"{' and '.join(named)}, " if named else ""


def _recipe_lines(recipe: Recipe) -> list[str]:
    """The recipe folded up; of paths the last part alone."""
    told = {k: v for k, v in recipe.model_dump(mode="json").items() if k in _TOLD}
    told["model"]["name"] = public_name(recipe.model.name)
    for where in (told["data"], *told["data"]["sources"]):
        if where["path"]:
            where["path"] = public_name(where["path"])
    text = yaml.safe_dump(_stated(told), allow_unicode=True, sort_keys=False, width=96)
    return [
        "<details>",
        "<summary>The recipe, every setting</summary>",
        "",
        *fenced(text, "yaml"),
        "</details>",
        "",
    ]


def _stated(value: Any) -> Any:
    """``value`` without settings that are empty."""
    if not isinstance(value, dict):
        return value
    inner = {key: _stated(inside) for key, inside in value.items()}
    return {key: inside for key, inside in inner.items() if inside not in (None, [], {}, "")}
