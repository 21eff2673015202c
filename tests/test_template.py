"""Formats of rows, and the chat templates that render them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from halfbyte.data.batch import Segment
from halfbyte.data.example import Example, Message
from halfbyte.data.template import Template, make_template
from halfbyte.data.text_template import parse_format
from halfbyte.data.tokenize import tokenize_rows
from halfbyte.errors import DataError
from halfbyte.recipe.data_schema import DataRecipe
from llama_tokenizer import llama_tokenizer

CHATDOCTOR = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### output:\n{output}"
DOCTOR = "If you are a doctor, please answer the medical questions."
INPUT_FIRST = "Context: {input}\nQuestion: {instruction}\nAnswer:\n{output}"
# As SmolLM2's: a system message of its own where none is given.
WITH_DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou help.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 3's: the beginning of sequence is written by the template, contents are trimmed.
WRITES_BOS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}</s>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_BOS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def llama(shared: Path) -> Any:
    return llama_tokenizer(shared / "data" / "llama-tokenizer" / "tokenizer.model")


def row_of(instruction: str, input: str, output: str) -> Example:
    return Example.question_and_answer(0, instruction, input, output)


def template_of(tokenizer: Any, template: str, **data: Any) -> Template:
    return make_template(DataRecipe(path="x.json", template=template, **data), tokenizer)[0]


def trained_ids(template: Template, tokenizer: Any, row: Example) -> tuple[list, list]:
    """The ids of the prompt and of the rest, as training has them."""
    segments = template.segments(row, "answer")
    [whole] = tokenize_rows(tokenizer, [segments], [0])
    at = int(whole.loss_mask.argmax())
    ids = whole.input_ids.tolist()
    return ids[:at], ids[at:]


def rendered(
    tokenizer: Any, template: Template, messages: list[dict[str, str]], *, generate: bool = True
) -> Any:
    """What a program that knows only the adapter's folder makes of messages."""
    return tokenizer.apply_chat_template(
        messages,
        chat_template=template.chat_template(),
        add_generation_prompt=generate,
        return_dict=False,
    )


# Line ends and the formats' own words, so that a question may look as if it had an input.
texts = st.lists(
    st.sampled_from(
        [
            "Say",
            " it",
            "\n",
            "\n\n",
            "### Input:\n",
            "\nQuestion: ",
            "é",
            "{",
            "'",
            '"',
            "\\n",
            "字",
        ]
    ),
    max_size=7,
).map(lambda pieces: "".join(pieces).strip())
FORMATS = {
    "alpaca": {"template": "alpaca"},
    "plain": {"template": "plain"},
    "chatdoctor": {"template": CHATDOCTOR},
    "chatdoctor, one instruction": {"template": CHATDOCTOR, "instruction": DOCTOR},
    "alpaca, one instruction": {"template": "alpaca", "instruction": DOCTOR},
    "input first": {"template": INPUT_FIRST},
    "input first, one instruction": {"template": INPUT_FIRST, "instruction": DOCTOR},
    "question alone": {"template": "Q: {instruction}\nA:{output}"},
    "chat": {"template": "chat"},
    "chat with a system message": {"template": "chat", "system": 'Be "brief"\n{{ always }}.'},
    "chat, one instruction": {"template": "chat", "instruction": DOCTOR},
}


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("model", ["tiny", "llama"])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(instruction=texts, input=texts)
def test_the_chat_template_renders_the_trained_prompt_token_for_token(
    model: str, name: str, instruction: str, input: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(model)
    if model == "llama":
        tokenizer.chat_template = NO_BOS
    template = template_of(tokenizer, **FORMATS[name])
    row = row_of(instruction, input, "Answer.")
    prompt, answer = trained_ids(template, tokenizer, row)
    user = {"role": "user", "content": template.question(row)}
    assert rendered(tokenizer, template, [user]) == prompt
    assert (prompt[:1] == [tokenizer.bos_token_id]) == (model == "llama")
    # The whole row too, which is also how the template continues a conversation.
    whole = [user, {"role": "assistant", "content": "Answer."}]
    assert rendered(tokenizer, template, whole, generate=False) == prompt + answer


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "chat, one instruction"])
@pytest.mark.parametrize("model", ["tiny", "llama"])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(said=st.lists(st.tuples(texts, texts), min_size=1, max_size=3), system=texts)
def test_the_chat_template_renders_trained_conversations_token_for_token(
    model: str,
    name: str,
    said: list[tuple[str, str]],
    system: str,
    request: pytest.FixtureRequest,
) -> None:
    tokenizer = request.getfixturevalue(model)
    if model == "llama":
        tokenizer.chat_template = NO_BOS
    template = template_of(tokenizer, **FORMATS[name])
    messages = [Message("system", system)] if system else []
    for asked, answered in said:
        messages += [Message("user", asked), Message("assistant", answered + ".")]
    example = Example(0, tuple(messages))
    spoken = [{"role": m.role, "content": m.content} for m in messages]
    segments = template.segments(example, "answer")
    [row] = tokenize_rows(tokenizer, [segments], [0])
    assert row.input_ids.tolist() == rendered(tokenizer, template, spoken, generate=False)
    # Each answer and its end is learned, and nothing else.
    end = f"{tokenizer.eos_token}\n" if template.name == "chat" else tokenizer.eos_token
    learned = "".join(segment.text for segment in segments if segment.learn)
    assert learned == "".join(f"{answered}.{end}" for _, answered in said)
    # What is prompted is how the row begins, and what a program makes of the messages before.
    assert "".join(segment.text for segment in segments).startswith(template.prompt(example))
    [prompt] = tokenize_rows(tokenizer, [[Segment(template.prompt(example), False)]], [0])
    assert prompt.input_ids.tolist() == rendered(tokenizer, template, spoken[:-1])
    last = "".join(s.text for s in template.segments(example, "last") if s.learn)
    assert last == f"{said[-1][1]}.{end}"
    assert all(segment.learn for segment in template.segments(example, "all"))


def test_a_row_in_each_format(tiny: Any) -> None:
    both = row_of("Add.", "1, 2", "3")
    alone = row_of("Add.", "", "3")
    assert template_of(tiny, CHATDOCTOR).prompt(both) == (
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### output:\n"
    )
    assert template_of(tiny, CHATDOCTOR, instruction=DOCTOR).prompt(row_of("Add.", "Hm.", "3")) == (
        f"### Instruction:\n{DOCTOR}\n\n### Input:\nHm.\n\n### output:\n"
    )
    assert template_of(tiny, "plain").prompt(both) == "Add.\n\n1, 2\n\n"
    assert template_of(tiny, "plain").prompt(alone) == "Add.\n\n"
    assert template_of(tiny, "alpaca").prompt(both) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
    )
    assert template_of(tiny, "alpaca").prompt(alone) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert template_of(tiny, "chat", system="Count.").prompt(both) == (
        "<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\nAdd.\n\n1, 2<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert template_of(tiny, '{{"q": {instruction}}}: {output}\n').prompt(alone) == '{"q": Add.}: '


@pytest.mark.parametrize("name", list(FORMATS))
def test_the_end_is_learned_and_written_once(tiny: Any, name: str) -> None:
    template = template_of(tiny, **FORMATS[name])
    row = row_of("Say one.", "Now.", "One.")
    segments = template.segments(row, "answer")
    text = "".join(segment.text for segment in segments)
    end = "\n" if template.name == "chat" else ""
    assert text == template.prompt(row) + "One.<|im_end|>" + end
    [found] = tokenize_rows(tiny, [segments], [0])
    at = found.input_ids.tolist().index(tiny.eos_token_id, len(trained_ids(template, tiny, row)[0]))
    assert found.loss_mask[at]
    if template.name != "chat":
        ended = template.segments(row_of("Say one.", "Now.", "One.<|im_end|>"), "answer")
        assert "".join(segment.text for segment in ended) == text
    learned = tokenize_rows(tiny, [template.segments(row, "all")], [0])[0].loss_mask
    assert learned[1:].all()
    assert not learned[0]


def test_a_system_message_takes_the_place_of_the_instruction(llama: Any) -> None:
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1, 2"}]
    row = row_of("Add.", "1, 2", "3")
    for data in (
        {"template": "alpaca"},
        {"template": CHATDOCTOR},
        {"template": CHATDOCTOR, "instruction": DOCTOR},
        {"template": INPUT_FIRST, "instruction": DOCTOR},
    ):
        template = template_of(llama, **data)
        stated = template_of(llama, data["template"])
        assert rendered(llama, template, messages) == trained_ids(stated, llama, row)[0]


def test_the_models_own_default_system_message_stays(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = WITH_DEFAULT_SYSTEM
    row = row_of("Hi.", "", "Ho.")
    template = template_of(tokenizer, "chat")
    assert template.chat_template() == WITH_DEFAULT_SYSTEM
    assert template.prompt(row).startswith("<|im_start|>system\nYou help.<|im_end|>\n")
    own = template_of(tokenizer, "chat", system="Be kind.")
    assert own.prompt(row).startswith("<|im_start|>system\nBe kind.<|im_end|>\n")
    user = [{"role": "user", "content": "Hi."}]
    for one in (template, own):
        assert rendered(tokenizer, one, user) == trained_ids(one, tokenizer, row)[0]
    # A system message that a chat states goes before the recipe's.
    said = [{"role": "system", "content": "Be short."}, *user]
    assert rendered(tokenizer, own, said) == rendered(tokenizer, template, said)


def test_a_template_that_writes_the_beginning_gets_no_second(llama: Any) -> None:
    row = row_of(" Hi. ", "", " Ho. ")
    llama.chat_template = WRITES_BOS
    template = template_of(llama, "chat")
    prompt, answer = trained_ids(template, llama, row)
    assert prompt == llama("<s>[user]Hi.</s>[assistant]", add_special_tokens=False)["input_ids"]
    assert prompt.count(llama.bos_token_id) == 1
    assert llama.decode(answer) == "Ho.</s>"
    assert template.chat_template() == WRITES_BOS


def test_a_template_with_the_date_renders_the_same_every_day(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    # As Llama 3.2's.
    tokenizer.chat_template = (
        '{% if strftime_now is defined %}{% set day = strftime_now("%d %b %Y") %}{% endif %}'
        "{{ 'Today: ' + day + ';' }}" + WITH_DEFAULT_SYSTEM
    )
    row = row_of("Hi.", "", "Ho.")
    template = template_of(tokenizer, "chat")
    assert template.prompt(row).startswith("Today: 26 Jul 2024;<|im_start|>system")
    user = [{"role": "user", "content": "Hi."}]
    assert rendered(tokenizer, template, user) == trained_ids(template, tokenizer, row)[0]
    [warning] = template.warnings
    assert "it is always 26 July 2024" in warning


def test_auto_is_chat_where_the_model_has_one(tiny: Any, tiny_model: Path) -> None:
    template, [choice] = make_template(DataRecipe(path="x"), tiny)
    assert (template.name, choice.value) == ("chat", "chat")
    without = AutoTokenizer.from_pretrained(tiny_model)
    without.chat_template = None
    template, [choice] = make_template(DataRecipe(path="x"), without)
    assert (template.name, choice.value) == ("alpaca", "alpaca")
    assert "no chat template" in choice.reason
    # Before a model is named rows can be looked at all the same.
    template, _ = make_template(DataRecipe(path="x"))
    assert template.prompt(row_of("Hi.", "", "")).endswith(
        "### Instruction:\nHi.\n\n### Response:\n"
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("alpacca", "'alpacca' is none of auto, chat, alpaca and plain"),
        ("{instruction}: {output} {", "a brace that is not closed"),
        ("{instruction}\n{intput}\n{output}", "{intput} is no place that a row can fill"),
        ("{output}\n{instruction}", "must end with {output}"),
        ("{instruction}: {output}.", "must end with {output}"),
        ("{instruction} {instruction} {output}", "once each"),
        ("{output}", "must hold {instruction}, {input} or both"),
        ("{instruction}{input}\n{output}", "nothing between {instruction} and {input}"),
    ],
)
def test_templates_that_are_none(text: str, sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_format(text)
    assert sentence in str(caught.value)


def test_what_does_not_fit_the_template_is_an_error(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(DataError, match=r"data\.system is for the template chat"):
        template_of(tokenizer, "alpaca", system="Be kind.")
    with pytest.raises(DataError, match="needs both"):
        template_of(tokenizer, "Q: {instruction}\nA: {output}", instruction=DOCTOR)
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    row = row_of("Hi.", "", "Ho.")
    with pytest.raises(DataError, match="no system role here"):
        template_of(tokenizer, "chat").prompt(row)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    with pytest.raises(
        DataError, match=r"otherwise once its answer follows \('<think>' becomes 'H"
    ):
        template_of(tokenizer, "chat").segments(row, "answer")
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="the model has no chat template"):
        template_of(tokenizer, "chat")
