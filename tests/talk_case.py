"""Run folders of tiny models to talk with, what a terminal shows, and what transformers says."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from halfbyte.cli.chat_answer import ChatSettings
from halfbyte.cli.chat_session import Session
from halfbyte.cli.units import visible
from halfbyte.data.template import make_template
from halfbyte.events import EventLog
from halfbyte.events.types import Finished
from halfbyte.export.adapter_folder import write_adapter_folder
from halfbyte.model.source import open_model
from halfbyte.recipe import Recipe
from halfbyte.recipe.write import dump_recipe

INSTRUCTION_FORMAT = "### Instruction:\n{instruction}\n\n### output:\n{output}"


def make_run(folder: Path, model: Path, template: str) -> Path:
    """The folder of a finished run whose adapter is random, and not zero."""
    from transformers import AutoModelForCausalLM

    recipe = Recipe.model_validate(
        {
            "precision": "fp32",
            "model": {"name": str(model)},
            "data": {"path": "rows.jsonl", "template": template},
            "quantization": {"upcast_rest": True},
            "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        }
    )
    draw = torch.Generator().manual_seed(1)
    layers = {
        name: (
            torch.randn(4, module.in_features, generator=draw),
            torch.randn(module.out_features, 4, generator=draw),
        )
        for name, module in AutoModelForCausalLM.from_pretrained(model).named_modules()
        if name.endswith(("q_proj", "v_proj"))
    }
    tokenizer = open_model(recipe.model).tokenizer
    write_adapter_folder(
        folder / "adapter",
        layers,
        lora={
            "r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "target_modules": ["q_proj", "v_proj"],
        },
        base_name=str(model),
        tokenizer=tokenizer,
        chat_template=make_template(recipe.data, tokenizer)[0].chat_template(),
        card="",
    )
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    with EventLog(folder) as log:
        log(Finished(1, 1.0))
    return folder


def expected(answerer: Any, prompt: str, *, adapter: bool = True, new: int = 12) -> str:
    """What transformers' ``generate`` says after ``prompt``."""
    tokenizer, network = answerer.tokenizer, answerer.model
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    before = network.config._attn_implementation
    network.config._attn_implementation = "sdpa"
    with answerer.qlora.adapter_on(adapter):
        out = network.generate(ids, do_sample=False, max_new_tokens=new)[0, ids.shape[1] :]
    network.config._attn_implementation = before
    return str(tokenizer.decode(out, skip_special_tokens=True)).rstrip("\ufffd")


def chatml(*said: str, system: str | None = None) -> str:
    turns = [] if system is None else [f"<|im_start|>system\n{system}<|im_end|>\n"]
    for number, text in enumerate(said):
        role = "assistant" if number % 2 else "user"
        turns.append(f"<|im_start|>{role}\n{text}<|im_end|>\n")
    return "".join(turns) + "<|im_start|>assistant\n"


def talk(
    answerer: Any, *lines: str | type[BaseException], system: str | None = None, **settings: Any
) -> str:
    """What a terminal shows; a class among ``lines`` is raised where a line was asked for."""
    waiting = [*lines, EOFError]

    def read(_: str) -> str:
        line = waiting.pop(0)
        if isinstance(line, str):
            return line
        raise line

    shown = io.StringIO()
    console = Console(file=shown, width=200, highlight=False, markup=False)
    chosen = ChatSettings(**{"max_new_tokens": 12, **settings})
    Session(answerer, chosen, console, system=system, read=read).run()
    talk.left = waiting  # type: ignore[attr-defined]
    return shown.getvalue()


def said(shown: str) -> list[str]:
    """The answers in what a terminal showed."""
    pattern = r"^(?:model|base|step-\d+): (.*?)\n(?:\d+ tokens?[^\n]*tokens/s|stopped;[^\n]*)$"
    return re.findall(pattern, shown, re.MULTILINE | re.DOTALL)


def on_screen(*answers: str) -> list[str]:
    """How a terminal shows ``answers``."""
    return [visible(text) for text in answers]
