"""Whatever a recipe holds, it is written so that it reads back the same."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from halfbyte.errors import RecipeError
from halfbyte.recipe import Recipe
from halfbyte.recipe.data_schema import OF_ONE_SOURCE, SourceRecipe
from halfbyte.recipe.load import parse_recipe
from halfbyte.recipe.settings import Setting, settings_of
from halfbyte.recipe.settings import settings as all_settings
from halfbyte.recipe.write import commented_recipe, dump_recipe

TEXTS = st.one_of(
    st.text(),
    st.sampled_from(
        [
            *(
                "no",
                "yes",
                "on",
                "off",
                "null",
                "~",
                "true",
                "1e-4",
                "12:30",
                "010",
                "0x1f",
                ".inf",
            ),
            *(
                "2024-01-01",
                "",
                " ",
                "\n",
                "a\n",
                "a\n\n",
                "\n\na",
                "  a\nb",
                "a \nb",
                "\ta\nb",
                "=",
                "<<",
            ),
            *(
                "- a",
                "a: b",
                "#a",
                "a #b",
                "*a",
                "&a",
                "!a",
                "%a",
                "@a",
                "`a",
                "'",
                '"',
                "{a}",
                "[a]",
            ),
            *(
                "\u2028",
                "\x85",
                "\ufeff",
                "\x07",
                "a\r\nb",
                "---",
                "...",
                "x" * 300,
                "x " * 200,
                "🦙\n🦙",
            ),
        ]
    ),
    st.lists(st.text(alphabet=" \tab:#-'\"\\\u2028é", max_size=12), max_size=6).map("\n".join),
)


def values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a part of the JSON schema takes, made from the schema alone."""
    if "anyOf" in schema:
        return st.one_of(*(values(part) for part in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    match schema["type"]:
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            high = schema.get("maximum", schema.get("exclusiveMaximum", 2**40) - 1)
            return st.integers(int(schema.get("minimum", -(2**40))), int(high))
        case "number":
            low = schema.get("minimum", schema.get("exclusiveMinimum"))
            high = schema.get("exclusiveMaximum")
            return st.floats(
                low,
                high,
                exclude_min="exclusiveMinimum" in schema,
                exclude_max=high is not None,
                allow_nan=False,
                allow_infinity=False,
            )
        case "array":
            least = schema.get("minItems", 0)
            return st.lists(values(schema["items"]), min_size=least, max_size=4)
        case "object":
            keys = TEXTS.filter(bool).map(re.escape)
            return st.dictionaries(keys, values(schema["additionalProperties"]), max_size=4)
        case _:
            return TEXTS.filter(lambda text: len(text) >= schema.get("minLength", 0))


FILTERS = st.one_of(
    st.builds(lambda text: {"filter": "pattern", "drop": re.escape(text)}, TEXTS),
    st.builds(
        lambda text, put: {
            "filter": "pattern",
            "field": "row",
            "replace": re.escape(text),
            "replacement": put.replace("\\", "\\\\"),
        },
        TEXTS,
        TEXTS,
    ),
    st.builds(
        lambda least: {"filter": "length", "answer_min_words": least, "question_max_words": None},
        st.integers(0, 9),
    ),
    st.sampled_from(
        [
            {"filter": "exact_duplicates", "by": "question", "normalize": True},
            {"filter": "near_duplicates", "threshold": 0.5},
            {"filter": "script", "allow": ["Latin", "Han"]},
            {"filter": "language", "allow": ["no", "en"]},  # the first is not false
            {"filter": "encoding"},
        ]
    ),
)


JINJA = st.one_of(
    st.builds(lambda text: {"text": text}, TEXTS),
    st.builds(lambda a, b: {"user": f"a{a}", "assistant": f"b{b}", "system": None}, TEXTS, TEXTS),
)


@st.composite
def sources(draw: st.DrawFn) -> dict[str, Any]:
    source: dict[str, Any] = {}
    for setting in settings_of(SourceRecipe):
        if not setting.key.startswith("jinja.") and (setting.required or draw(st.booleans())):
            put(source, setting, draw(values(setting.schema)))
    if draw(st.booleans()):
        source["jinja"] = draw(JINJA)
    source.pop("weight" if source.get("rows") else "rows", None)
    return source


def put(tree: dict[str, Any], setting: Setting, value: Any) -> None:
    *above, name = setting.key.split(".")
    for part in above:
        tree = tree.setdefault(part, {})
    tree[name] = value


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    tree: dict[str, Any] = {}
    groups = {"data.cleaning": st.lists(FILTERS, max_size=3), "data.sources": st.just([])}
    for key, setting in all_settings().items():
        if key.startswith("data.jinja."):
            continue
        if setting.required or draw(st.booleans()):
            name = setting.name
            value = draw(groups[key] if key in groups else values(setting.schema))
            if name in ("target_modules", "exclude_modules") and isinstance(value, str):
                value = f".*{re.escape(value)}"  # a text is a regular expression there
            if name == "new_tokens":
                value = list(dict.fromkeys(value))  # each once
            if name == "url_env" and value is not None:
                value = "V" + re.sub(r"\W", "_", value, flags=re.ASCII)  # a variable's name
            put(tree, setting, value)
    data = tree.setdefault("data", {})
    if draw(st.booleans()):
        data["sources"] = draw(st.lists(sources(), min_size=1, max_size=3))
        for one in (*OF_ONE_SOURCE, "path", "held_out_from"):
            data.pop(one, None)
    else:
        data["path"] = draw(TEXTS.filter(bool))
        if draw(st.booleans()):
            data["jinja"] = draw(JINJA)
    if data.get("template", "auto") not in ("auto", "chat", "alpaca", "plain"):
        data["template"] += "{output}"
    return Recipe.model_validate(tree)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipes())
def test_a_recipe_reads_back_as_it_was_written(recipe: Recipe) -> None:
    text = dump_recipe(recipe)
    again = parse_recipe(text, "r.yaml")
    assert again == recipe
    assert list(yaml.compose(text).value[0][0].value)  # and it is YAML for others too
    assert parse_recipe(commented_recipe(recipe), "r.yaml") == recipe
    assert dump_recipe(again) == text


def test_pyyaml_itself_reads_the_same_values() -> None:
    recipe = parse_recipe(
        "model: {name: 'no'}\n"
        "data: {path: '010', template: \"a\\n{output}\"}\n"
        "title: 'yes'\nauthor: '2024-01-01'\nobjective: '12:30'\n"
        "training: {learning_rate: 2e-4, adam_epsilon: 1e-8}\n",
        "r.yaml",
    )
    assert yaml.safe_load(dump_recipe(recipe)) == recipe.model_dump()


def test_what_reads_well_is_kept_readable() -> None:
    template = "### Instruction:\n{instruction}\n\n### output:\n{output}"
    recipe = Recipe.model_validate(
        {"model": {"name": "m"}, "data": {"path": "d", "template": template}}
    )
    text = dump_recipe(recipe)
    assert "  template: |-\n    ### Instruction:\n    {instruction}\n\n    ### output:" in text
    keys = [line.split(":")[0] for line in text.splitlines() if line[:1].isalpha()]
    assert keys == list(Recipe.model_fields)
    assert "# Peak rate; auto is 2e-4" in commented_recipe(recipe)


LINES = st.sampled_from(
    [
        *("model:", "  name: a", "data:", "  path: b", "training:", "  epochs: 3", "  epochs: x"),
        *(
            "seed: 1",
            "lora:",
            "  r: 0",
            "- a",
            "&a b",
            "*a",
            "? x",
            "!!python/object:os.x y",
            "%YAML 1",
        ),
        *(
            "a: [",
            "}",
            "\t",
            "---",
            '"\\U99999999"',
            '"\\ud800"',
            "1: 2",
            "~: 1",
            "<<: {a: 1}",
            ": x",
        ),
        *("title: .nan", "seed: 1e400", "seed: " + "9" * 5000, "lora_r: 8", "[" * 400, "{a: " * 60),
    ]
)


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(st.text(), st.lists(LINES, max_size=8).map("\n".join)),
    st.lists(st.text(), max_size=2),
)
def test_any_text_is_a_recipe_or_one_sentence(text: str, overrides: list[str]) -> None:
    try:
        parse_recipe(text, "r.yaml", overrides)
    except RecipeError as error:
        sentence = str(error)
        assert "\n" not in sentence or "\n" in "".join(overrides)
        assert sentence.endswith((".", "?"))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(all_settings())),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=5,
    ),
)
def test_any_value_of_any_setting_is_taken_or_refused_by_name(key: str, value: Any) -> None:
    tree: dict[str, Any] = {"model": {"name": "m"}, "data": {"path": "d"}}
    *above, name = key.split(".")
    holder = tree
    for part in above:
        holder = holder.setdefault(part, {})
    holder[name] = value
    try:
        recipe = parse_recipe(yaml.safe_dump(tree), "r.yaml")
    except RecipeError as error:
        refusal = str(error)
    else:
        assert parse_recipe(dump_recipe(recipe), "r.yaml") == recipe
        return
    assert refusal.startswith("r.yaml, line ")
    assert name in refusal or "a key must be a name" in refusal


def test_python_is_as_strict_as_yaml() -> None:
    for wrong in ({"seed": "1"}, {"sed": 1}, {"training": {"learning_rate": float("inf")}}):
        with pytest.raises(ValidationError):
            Recipe.model_validate({"model": {"name": "m"}, "data": {"path": "d"}, **wrong})
