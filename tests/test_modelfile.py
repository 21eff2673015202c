"""Modelfiles: their Go templates, evaluated, against the chat templates that were trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment
from jinja2.exceptions import TemplateError

from go_template_case import go_render, ollama_data
from halfbyte.data.text_template import ALPACA, PLAIN, TextTemplate, parse_format
from halfbyte.export.gguf.modelfile import Modelfile, go_template
from halfbyte.export.gguf.turn_format import find_turn_format
from halfbyte.model.gguf_file import GgufFile

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}"
    "{% set system = false %}{% endif %}{% for message in rest %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}{{ raise_exception('no system') }}"
    "{% endif %}{% endfor %}"
)
MISTRAL3 = (  # the system message goes with the last question
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = message['content'] %}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}{% if loop.last and ns.system %}"
    "{{ ns.system + '\n\n' }}{% endif %}{{ message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
THINKING = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")

TALK = [
    ("user", "My knee hurts\nsince Monday, what is it?"),
    ("assistant", "It may be a strain.\n\n1. Rest it.\n2. Cool it."),
    ("user", "Is {{ this }} or \"that\" 'better'? §€ 東京"),
    ("assistant", "That."),
    ("user", "Thanks"),
]
SYSTEM = "You are a doctor.\nBe kind."


class Tokens:
    """As much of a tokenizer as formats of halfbyte's own ask for."""

    bos_token, eos_token = "<s>", "</s>"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [*([-1] if add_special_tokens else []), *map(ord, text)]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return ["<s>" if i < 0 else chr(i) for i in ids]


def rendered(template: str) -> Callable[[Any], str]:
    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    compiled = environment.from_string(template)

    def render(messages: Any) -> str:
        try:
            return compiled.render(
                messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
            )
        except TemplateError as error:
            raise ValueError(str(error)) from error

    return render


def own(format: Any, **settings: Any) -> str:
    return TextTemplate(format, Tokens(), **settings).chat_template()


FORMATS = {
    "chatml": CHATML,
    "qwen": QWEN,
    "llama 3": LLAMA3,
    "llama 2": LLAMA2,
    "zephyr": ZEPHYR,
    "mistral": MISTRAL,
    "mistral v0.3": MISTRAL3,
    "thinking": THINKING,
    "alpaca": own(ALPACA),
    "alpaca, one instruction": own(ALPACA, instruction="Answer as a doctor."),
    "plain": own(PLAIN),
    "custom": own(parse_format("### Instruction:\n{instruction}\n\n### output:\n{output}")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_go_template_renders_what_was_trained(name: str) -> None:
    render = rendered(FORMATS[name])
    found = find_turn_format(render)
    assert found is not None
    template = go_template(found)
    assert template is not None
    for length in (1, 3, 5):
        talk = [{"role": role, "content": content} for role, content in TALK[:length]]
        assert go_render(template, ollama_data(talk)) == render(talk)
        if found.where is None:
            continue
        asked = [{"role": "system", "content": SYSTEM}, *talk]
        assert go_render(template, ollama_data(talk, SYSTEM)) == render(asked)
    assert (found.where is None) == (name == "mistral")


@pytest.mark.parametrize(
    "template",
    [
        # Each message has its number; the words of a message are counted; it is in capitals.
        CHATML.replace("message['content']", "(loop.index | string) + message['content']"),
        CHATML.replace("message['content']", "(message['content'] | length | string)"),
        CHATML.replace("message['content']", "(message['content'] | upper)"),
        "{% for m in messages %}{{ m['content'] }}\n{% endfor %}{{ messages | length }}",
    ],
)
def test_what_is_more_than_texts_is_left_out(template: str) -> None:
    assert find_turn_format(rendered(template)) is None


def test_text_of_a_modelfile() -> None:
    text = Modelfile("m.gguf", 'A "b" {{ .System }}\n', ["</s>", 'a"b'], "Be\nbrief.").text()
    assert text == (
        'FROM ./m.gguf\nTEMPLATE """A "b" {{ .System }}\n"""\nPARAMETER stop "</s>"\n'
        'PARAMETER stop """a"b"""\nSYSTEM """Be\nbrief."""\n'
    )
    assert Modelfile("m.gguf", None, [], None).text() == "FROM ./m.gguf\n"


def test_a_models_own_template(smollm2_gguf: Path) -> None:
    """SmolLM2's, with its system message that stands there where none is said."""
    template = GgufFile(smollm2_gguf).metadata["tokenizer.chat_template"]
    found = find_turn_format(rendered(template))
    assert found is not None
    assert "helpful AI assistant named SmolLM" in found.first
