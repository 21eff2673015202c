"""The adapter as other programs load it: weights, tokenizer, the trained template, a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from halfbyte.model.adapter_files import save_adapter

BASE_TEMPLATE = "base_chat_template.jinja"


def write_adapter_folder(
    folder: Path,
    layers: dict[str, tuple[Tensor, Tensor]],
    *,
    lora: dict[str, Any],
    base_name: str,
    tokenizer: Any,
    chat_template: str,
    card: str,
) -> None:
    """Write ``folder`` in PEFT's layout.

    ``layers`` gives A [r, in] and B [out, r] (fp32) by the layer's full name; ``lora`` holds r,
    lora_alpha, lora_dropout and target_modules. ``chat_template`` renders the format that was
    trained; the base's own, where it has one, is kept beside it, since prompting the adapter with
    a template that it did not learn is a mistake that nothing would show.
    """
    save_adapter(folder, layers, base_name=base_name, **lora)
    base_template = tokenizer.chat_template
    tokenizer.chat_template = chat_template
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = base_template
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    if isinstance(base_template, str):
        (folder / BASE_TEMPLATE).write_text(base_template, encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
