"""What each technique did in this run, in figures."""

from __future__ import annotations

from halfbyte.events.types import ModelLoaded, Technique
from halfbyte.report import figures
from halfbyte.report.blocks import Block, Paragraph, Table
from halfbyte.report.story import Story

# The order of the report; what a run records beside these follows.
_ORDER = ("gradient checkpointing", "mixed precision", "optimizer")


def key_techniques(story: Story) -> list[Block]:
    """One row for each technique: its name, whether it was used, and what it did."""
    rows: list[tuple[str, str, str]] = []
    if story.model is not None:
        rows.append(("4-bit loading (NF4)", "yes", _four_bit(story.model)))
        rows.append(("LoRA", "yes", _lora(story, story.model)))
    known = [story.techniques[name] for name in _ORDER if name in story.techniques]
    others = [t for name, t in story.techniques.items() if name not in _ORDER]
    rows += [_row(technique) for technique in [*known, *others]]
    if not rows:
        return [Paragraph("None was recorded.")]
    return [Table(("technique", "used", "what it did in this run"), rows, "lll")]


def _row(technique: Technique) -> tuple[str, str, str]:
    return technique.name, "yes" if technique.on else "no", technique.text


def _four_bit(m: ModelLoaded) -> str:
    text = (
        f"{figures.many(m.quantized_modules, 'weight matrix', 'weight matrices')} went from "
        f"{figures.size(m.bytes_before)} at 16 bits to {figures.size(m.bytes_after)} in 4 bits, "
        f"scales included ({figures.percentage(m.bytes_after, m.bytes_before)} of before); norms, "
        f"embeddings and head, which stay as they are, take {figures.size(m.bytes_other)}."
    )
    if m.bytes_copy:
        text += (
            f" A dequantized copy of {figures.size(m.bytes_copy)} was kept beside them for speed, "
            "so that in this run 4 bits saved no memory but decided the values."
            if m.bytes_copy + m.bytes_after > m.bytes_before
            else f" A dequantized copy of {figures.size(m.bytes_copy)} was kept for speed."
        )
    return text


def _lora(story: Story, m: ModelLoaded) -> str:
    lora = story.recipe.lora
    layers = ", ".join(f"{name} ({figures.count(n)})" for name, n in m.lora_modules.items())
    adapted = figures.many(sum(m.lora_modules.values()), "linear layer")
    return (
        f"Adapters of rank {lora.r} on {adapted}: {layers}; "
        f"{figures.many(m.parameters_trainable, 'parameter')} to train in place of "
        f"{figures.count(m.parameters_base)}."
    )
