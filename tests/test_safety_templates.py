"""Templates of strangers: they reach nothing, and are stopped where they take too much."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

import halfbyte.data.template_process as template_process
from chat_case import CONVERSATIONS, FAMILIES, tokenizer_of
from halfbyte.data.chat_render import ChatRender, TemplateFailed
from halfbyte.data.chat_template import ModelChat, own_template, pin_dates
from halfbyte.data.cleaning.parts import messages_of
from halfbyte.data.cleaning.patterns import pattern
from halfbyte.data.example import Example, Message
from halfbyte.data.formats.format import Origin, examples
from halfbyte.data.formats.jinja_rows import JinjaRows
from halfbyte.data.known_templates import KNOWN, is_known
from halfbyte.data.template import rows_of_each
from halfbyte.data.template_process import Failed, TemplateStopped
from halfbyte.data.turns import RowRefused
from halfbyte.errors import DataError, RecipeError
from halfbyte.generate.conversation import Conversation
from halfbyte.model.lora_targets import adapter_ranks, choose_targets
from halfbyte.recipe.cleaning import Pattern
from halfbyte.recipe.data_schema import JinjaRecipe
from halfbyte.recipe.load import parse_recipe
from safety_case import RECIPE, halfbyte, refused

# What takes all memory or time where nothing stops it; each with why it is stopped.
HARMFUL = {
    "a long text": "{{ 'a' * 10**11 }}",
    "texts of texts": "{% set ns = namespace(a='aa') %}{% for i in range(60) %}"
    "{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a }}",
    "a wide filter": "{{ 'a' | center(10**11) }}",
    "a wide format": "{{ '%*d' % (10**11, 1) }}",
    "a list": "{{ [1] * 10**11 }}",
    "a replacement": "{{ ('a' * 10**6) | replace('a', 'b' * 10**6) }}",
    "an indented text": "{{ ('a\\n' * 10**7) | indent(10**5) }}",
}
LOOPS = (
    "{% for i in range(90000) %}{% for j in range(90000) %}{% for k in range(90000) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)
# What only fails: no text comes of it, and nothing else either.
FAILING = {
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "a climb": "{{ ().__class__.__base__.__subclasses__() }}",
    "a climb by filter": "{{ (() | attr('__class__')).__base__ }}",
    "a climb by text": "{{ '{0.__class__.__init__.__globals__}'.format(1) }}",
    "a climb by function": "{{ raise_exception.__globals__['json'].__loader__ }}",
    "a climb by namespace": "{{ namespace.__init__.__globals__ }}",
    "a name of Python's": "{% set ns = namespace(__class__=1) %}{{ ns.__class__.x }}",
    "a change": "{{ messages.append(1) }}",
    "a cycle": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "an inclusion": "{% include '/etc/passwd' %}",
    "an import": "{% import '/etc/passwd' as a %}",
    "an extension": "{% extends 'a' %}",
    "a division": "{{ 1 // 0 }}",
    "no template": "{% for %}",
    "a deep expression": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "its own refusal": "{{ raise_exception('not so') }}",
}


def chat_of(source: str) -> Any:
    tokenizer = tokenizer_of("qwen-2.5")
    before = tokenizer.chat_template
    tokenizer.chat_template = source
    try:
        return ChatRender(source, tokenizer)
    finally:
        tokenizer.chat_template = before


def rendered(source: str) -> str:
    return chat_of(source)([[{"role": "user", "content": "a"}]], generate=True)[0]


@pytest.mark.parametrize("what", HARMFUL)
def test_what_takes_too_much_is_stopped(what: str) -> None:
    """By its memory; the next one is served."""
    with pytest.raises(TemplateStopped, match=r"MB of memory|ends the process") as stopped:
        rendered(HARMFUL[what])
    assert "use another one." in str(stopped.value)
    assert rendered("{{ messages[0].content }}") == "a"


@pytest.mark.parametrize("what", FAILING)
def test_what_fails_does_no_more(what: str) -> None:
    process = template_process.template_process()
    rendered("{{ 1 }}")
    before = process._child
    with pytest.raises(TemplateFailed):
        rendered(FAILING[what])
    assert rendered("{{ messages[0].content }}") == "a"
    assert process._child is before


def test_a_loop_without_an_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the parent, and by the system where there is no parent any more."""
    process = template_process.template_process()
    process.close()
    monkeypatch.setattr(template_process, "WAITED", 2.0)
    rendered("{{ 1 }}")
    child = process._child
    assert child is not None
    with pytest.raises(TemplateStopped, match=r"takes more than 2\.0 seconds"):
        rendered(LOOPS)
    assert child.poll() is not None
    limits = (
        "import halfbyte.data.template_worker as w, time\n"
        "w.SECONDS = 0\n"
        "w._limit(); w._more_time()\n"
        "while True: pass\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", limits], timeout=60, check=False)
    assert done.returncode in (-24, -9)  # SIGXCPU, SIGKILL


def test_the_worker_has_nothing_to_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No secrets, no module of the working directory, no file or process to begin."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.chdir(tmp_path)
    for name in ("jinja2.py", "json.py", "halfbyte.py", "sitecustomize.py"):
        (tmp_path / name).write_text("import os\nos.mkdir('executed')\n")
    process = template_process.template_process()
    process.close()
    assert rendered("{{ 1 }}") == "1"
    child = process._child
    assert child is not None
    environment = Path(f"/proc/{child.pid}/environ").read_bytes()
    assert b"PATH=" in environment
    assert b"hf_secret" not in environment
    limits = Path(f"/proc/{child.pid}/limits").read_text()
    for line, most in (("Max file size", 0), ("Max processes", 0), ("Max core file size", 0)):
        [found] = [row for row in limits.splitlines() if row.startswith(line)]
        assert found.removeprefix(line).split()[:2] == [str(most)] * 2
    assert not (tmp_path / "executed").exists()


def test_a_worker_that_was_killed_is_begun_again() -> None:
    chat = chat_of("{{ messages[0].content }}!")
    process = template_process.template_process()
    for _ in range(2):
        assert chat([[{"role": "user", "content": "a"}]], generate=False) == ["a!"]
        assert process._child is not None
        process._child.kill()
        process._child.wait()


def test_an_answer_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that was taken over writes what it likes, and that is no text."""
    process = template_process.template_process()
    for answer in (b"{}", b"[[", b"[" * 5000, b"\xff"):
        rendered("{{ 1 }}")
        frame = iter([struct.pack("<Q", len(answer)), answer])
        monkeypatch.setattr(template_process, "_bytes", lambda *_, frame=frame: [next(frame)])
        with pytest.raises(TemplateStopped):
            rendered("{{ 1 }}")
        monkeypatch.undo()
    frame = iter([struct.pack("<Q", 1 << 60)])
    monkeypatch.setattr(template_process, "_bytes", lambda *_: [next(frame)])
    with pytest.raises(TemplateStopped):
        rendered("{{ 1 }}")
    assert process._child is None


# ---- the same texts as transformers, and as in this process --------------------------------------


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_worker_renders_what_transformers_renders(name: str) -> None:
    """Texts, refusals and marks, of known templates here and of unknown ones apart."""
    tokenizer = tokenizer_of(name)
    here = ChatRender(tokenizer.chat_template, tokenizer)
    apart = ChatRender(tokenizer.chat_template + "{# as it is #}", tokenizer)
    assert (here.apart, apart.apart) == (False, True)
    compared = 0
    for example in CONVERSATIONS.values():
        spoken = here.messages(example.messages)
        assert apart.messages(example.messages) == spoken
        parts = [spoken[: at + 1] for at in range(len(spoken))]
        for generate in (True, False):
            for part in parts:
                try:
                    [expected], _ = chat_template_utils.render_jinja_template(
                        [part],
                        tools=[dict(tool) for tool in example.tools] or None,
                        chat_template=tokenizer.chat_template,
                        add_generation_prompt=generate,
                        **tokenizer.special_tokens_map,
                    )
                except Exception:
                    for chat in (here, apart):
                        with pytest.raises(TemplateFailed):
                            chat([part], generate=generate, tools=example.tools)
                    continue
                for chat in (here, apart):
                    assert chat([part], generate=generate, tools=example.tools) == [expected]
                compared += 1
        if here.marks_answers:
            texts, marks = chat_template_utils.render_jinja_template(
                [spoken],
                tools=[dict(tool) for tool in example.tools] or None,
                chat_template=tokenizer.chat_template,
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
            )
            wanted = texts[0], [(start, end) for start, end in marks[0] if end > start]
            for chat in (here, apart):
                assert chat.with_marks(spoken, example.tools) == wanted
    assert compared > 10


@pytest.mark.parametrize("name", ["mistral-nemo", "qwen-3", "chatml-generation", "gemma-2"])
def test_many_rows_at_once_are_the_rows_one_by_one(name: str) -> None:
    """Through the worker, in batches, and here; those that are refused in their places."""
    tokenizer = tokenizer_of(name)
    here = ModelChat(tokenizer)
    known, tokenizer.chat_template = tokenizer.chat_template, tokenizer.chat_template + "{# #}"
    try:
        apart = ModelChat(tokenizer)
    finally:
        tokenizer.chat_template = known
    assert apart._chat.apart
    rows = [*CONVERSATIONS.values(), Example(0, (Message("assistant", "a"),))] * 8
    for loss_on in ("answer", "all"):
        found = list(rows_of_each(apart, rows, loss_on))
        assert len(found) == len(rows)
        for example, made in zip(rows, found, strict=True):
            if isinstance(made, RowRefused):
                with pytest.raises(RowRefused, match=f"^{re.escape(str(made))}$"):
                    here.rows(example, loss_on)
            else:
                assert made == here.rows(example, loss_on)


def test_what_is_known_is_what_was_looked_at() -> None:
    for name in FAMILIES:
        template = own_template(tokenizer_of(name)) or ""
        assert is_known(template)
        assert is_known(pin_dates(template)[0])
        assert not is_known(template + " ")
    assert set(KNOWN.values()) == set(FAMILIES)


# ---- where they come from ------------------------------------------------------------------------


def test_a_row_that_a_template_stops_at_is_named() -> None:
    tokenizer = tokenizer_of("qwen-2.5")
    known = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.content == 'boom' %}{{ 'a' * 10**11 }}"
        "{% endif %}{% endfor %}"
    )
    try:
        chat = ModelChat(tokenizer)
    finally:
        tokenizer.chat_template = known
    rows = [
        Example(n, (Message("user", "boom" if n == 70 else "a"), Message("assistant", "b")))
        for n in range(200)
    ]
    with pytest.raises(TemplateStopped, match="at row 71, takes more than"):
        list(rows_of_each(chat, rows, "answer"))


def test_a_recipes_template_is_stopped_at_its_row() -> None:
    recipe = JinjaRecipe(text="{{ word }}{% if word == 'boom' %}{{ 'a' * 10**11 }}{% endif %}")
    rows: list[dict[str, object]] = [{"word": f"w{n}"} for n in range(200)]
    made = [one.text for one in examples(JinjaRows(recipe, ["word"]), rows, Origin("a.csv"))]
    assert made == [f"w{n}" for n in range(200)]
    rows[130]["word"] = "boom"
    with pytest.raises(TemplateStopped, match=r"^a\.csv, row 131: data\.jinja takes more than"):
        list(examples(JinjaRows(recipe, ["word"]), rows, Origin("a.csv")))


def test_a_template_sees_nothing_of_other_packages() -> None:
    """Of a cell's own types a template has the values, and of others the text."""

    class Mine(str):
        def write(self, path: str) -> None:
            Path(path).touch()

    recipe = JinjaRecipe(text="{{ a.write('executed') }}")
    [failed] = JinjaRows(recipe, ["a"])._rendered([{"a": Mine("x")}])
    assert isinstance(failed, Failed)
    assert not Path("executed").exists()


def test_the_command_line_says_so_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tiny_rows: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copy(tiny_rows, tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    jinja = "data.jinja={text: \"{{ 'a' * 10**11 }}\"}"
    assert "takes more than 512 MB" in refused("data", "recipe.yaml", "--set", jinja)
    assert halfbyte("train", "recipe.yaml", "--out", "run").code == 0
    saved = tmp_path / "run" / "adapter" / "chat_template.jinja"
    good = saved.read_text()
    for bad, said in (
        ("{{ 'a' * 10**11 }}", "takes more than 512 MB"),
        ("{% for %}", "does not take this conversation"),
        ("{# nothing #}", "writes nothing of this conversation"),
        ("a" * (1 << 19), "longer than"),
        ("{# #}" * (1 << 19), "larger than"),
    ):
        saved.write_text(bad)
        assert said in refused("chat", "run")
    saved.write_text(good)
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    template = tmp_path / "model" / "chat_template.jinja"
    assert template.exists() or "chat_template" in settings
    template.write_text("{% for m in messages %}{{ m.content * 10**10 }}{% endfor %}")
    told = refused("data", "recipe.yaml")
    assert "chat template" in told
    assert "takes more than 512 MB" in told
    assert "row" in told


def test_a_conversation_is_rendered_apart() -> None:
    tokenizer = tokenizer_of("qwen-2.5")
    known = tokenizer.chat_template
    tokenizer.chat_template = "{{ 'a' * 10**11 }}"
    try:
        conversation = Conversation(tokenizer, room=100, count=len)
    finally:
        tokenizer.chat_template = known
    with pytest.raises(DataError, match="takes more than"):
        conversation.prompt("a")


# ---- regular expressions -------------------------------------------------------------------------

ENDLESS = "(a+)+b"  # in forty a, which it tries to divide in every way
LAYERS = ["model." + "a" * 40, "model.q_proj"]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    process = template_process.template_process()
    process.close()
    monkeypatch.setattr(template_process, "WAITED", 2.0)
    yield
    process.close()


@pytest.mark.usefixtures("impatient")
def test_an_expression_without_an_end_is_stopped_at_its_row() -> None:
    said = [Message("assistant", "a" * 40 if n == 70 else f"a{n}ab") for n in range(100)]
    rows = [Example(n, (one,)) for n, one in enumerate(said)]
    settings = Pattern(filter="pattern", drop=ENDLESS, field="answer")
    with pytest.raises(TemplateStopped, match=r"of data\.cleaning, at row 71, takes more than 2"):
        list(pattern(settings, rows))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "choose",
    [
        lambda: choose_targets(LAYERS, r"model\.(a+)+b"),
        lambda: adapter_ranks(LAYERS, 8, {ENDLESS: 4}),
    ],
)
def test_an_expression_for_layers_without_an_end_is_stopped(choose: Callable[[], Any]) -> None:
    with pytest.raises(TemplateStopped, match=r"regular expression of lora\.\w+ takes more than 2"):
        choose()


@pytest.mark.parametrize("replace", [False, True])
def test_expressions_find_what_python_finds(replace: bool) -> None:
    """In every field, of rows of all kinds; with groups in what is put there."""
    texts = ["Call 12 or 345.", "none", "", "77", "a\nb 8", "\ud800 9"]
    rows = [
        Example(n, (Message("user", one), Message("assistant", two, reasoning=one)), input=one)
        for n, (one, two) in enumerate(itertools.product(texts, texts))
    ]
    rows.append(Example(99, text="5 texts"))
    more = {"replace": r"(\d)(\d*)", "replacement": r"<\2\1>"} if replace else {"drop": r"\d\d"}
    for field in ("question", "answer", "row"):
        settings = Pattern(filter="pattern", field=field, **more)
        found = list(pattern(settings, rows))
        assert len(found) == len(rows)
        for example, verdict in zip(rows, found, strict=True):
            said = list(messages_of(example, field))
            hits = [text for text in said if re.search(settings.drop or settings.replace, text)]
            assert (verdict is None) == (not hits)
            if verdict is not None and replace:
                mended, _ = verdict
                wanted = [re.sub(settings.replace, settings.replacement, text) for text in said]
                assert list(messages_of(mended, field)) == wanted


@pytest.mark.parametrize("wrong", ["(" * 5000 + ")" * 5000, "(", "a{1,2}{3}(?P<n>", "[" * 3000])
def test_an_expression_that_is_none_is_told(wrong: str) -> None:
    quoted = json.dumps(wrong)
    recipe = RECIPE.replace("held_out: 4", f"cleaning: [{{filter: pattern, drop: {quoted}}}]")
    for text in (recipe, RECIPE + f"lora: {{target_modules: {quoted}}}\n"):
        with pytest.raises(RecipeError, match="regular expression"):
            parse_recipe(text, "recipe.yaml")
