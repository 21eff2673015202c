"""Models that the audit's broken data sets are for: a tokenizer and a configuration, no weights."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import processors
from transformers import AutoTokenizer

CONTEXT = 4096
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_models(folder: Path, tiny_model: Path) -> None:
    """Put the models of ``broken_data`` into ``folder``, made from the tiny one's tokenizer."""
    _model(folder / "model", tiny_model, template=CHATML)
    _model(folder / "model-with-begin", tiny_model, template=CHATML, begin="added")
    _model(
        folder / "model-with-begin-in-its-template",
        tiny_model,
        template="{{ bos_token }}" + CHATML,
        begin="known",
    )
    without_end = CHATML.replace("<|im_end|>\n{% endfor %}", "\n{% endfor %}")
    _model(folder / "model-without-end", tiny_model, template=without_end)


def _model(folder: Path, tiny_model: Path, *, template: str, begin: str = "") -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    if begin:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
    if begin == "added":
        pair = ("<s>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[pair]
        )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = json.loads((tiny_model / "config.json").read_text())
    (folder / "model.safetensors").symlink_to(tiny_model / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
