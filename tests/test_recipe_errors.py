"""A wrong recipe is one sentence that says what is wrong, where, and what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.errors import RecipeError
from halfbyte.recipe import Recipe
from halfbyte.recipe.foreign import NAMES, NOT_SETTINGS, VALUES
from halfbyte.recipe.load import MAX_BYTES, load_recipe, parse_recipe
from halfbyte.recipe.settings import sections, settings

GOOD = """\
model:
  name: m
data:
  path: d.jsonl
"""

# What is added to a good recipe of four lines: the whole sentence.
WRONG = {
    # keys that are none
    "training:\n  epochs: 3\n  learning_rat: 1e-4\n": (
        "r.yaml, line 7: training.learning_rat is not a setting; "
        "did you mean training.learning_rate?"
    ),
    "sead: 1\n": "r.yaml, line 5: sead is not a setting; did you mean seed?",
    "trainig:\n  epochs: 3\n": "r.yaml, line 5: trainig is not a setting; did you mean training?",
    "lora:\n  xyzzy: 3\n": (
        "r.yaml, line 6: lora.xyzzy is not a setting; lora takes r, lora_alpha, lora_dropout, "
        "target_modules, "
    ),
    "qqqqq: 1\n": "r.yaml, line 5: qqqqq is not a setting; the sections are model, data, ",
    "1: 2\n": "r.yaml, line 5: 1 is not a setting; the sections are ",
    "lora_r: 8\n": "r.yaml, line 5: lora_r is not a setting; here it is called lora.r.",
    "training:\n  num_train_epochs: 3\n": (
        "r.yaml, line 6: training.num_train_epochs is not a setting; here it is called "
        "training.epochs."
    ),
    "num_train_epoch: 3\n": (
        "r.yaml, line 5: num_train_epoch is not a setting; did you mean training.epochs?"
    ),
    "micro_batch_size: 2\n": (
        "r.yaml, line 5: micro_batch_size is not a setting; here it is called training.batch_size."
    ),
    "padding_free: true\n": (
        "r.yaml, line 5: padding_free is not a setting: rows always lie end to end, without "
        "padding, and never see each other."
    ),
    "sample_packing: true\n": (
        "r.yaml, line 5: sample_packing is not a setting; here it is called data.packing."
    ),
    "learning_rate: 1e-4\n": (
        "r.yaml, line 5: learning_rate is not a setting; learning_rate belongs elsewhere: "
        "training.learning_rate."
    ),
    "training:\n  seed: 1\n": (
        "r.yaml, line 6: training.seed is not a setting; seed belongs elsewhere: "
        "seed (at the top level)."
    ),
    "revision: main\n": "belongs elsewhere: model.revision or data.revision.",
    "training.epochs: 3\n": (
        "r.yaml, line 5: training.epochs is written in two lines: `training:` and, indented "
        "under it, `epochs:`."
    ),
    # keys in a wrong shape
    "seed: 1\nseed: 2\n": "r.yaml, line 6: seed is given twice; it stands on line 5 already.",
    "lora:\n  r: 8\n  r: 16\n": "r.yaml, line 7: lora.r is given twice; it stands on line 6",
    "training: 3\n": "r.yaml, line 5: training is a section; its settings (learning_rate, ",
    "lora: [r, 8]\n": "r.yaml, line 5: lora is a section; its settings (r, lora_alpha, ",
    "? [a]\n: 1\n": "r.yaml, line 5: a key must be a name.",
    # values
    "training:\n  epochs: three\n": (
        'r.yaml, line 6: training.epochs must be a number above 0, or auto, not "three".'
    ),
    "training:\n  epochs: '3'\n": (
        'r.yaml, line 6: training.epochs must be a number above 0, or auto, not "3"; write the '
        "number alone, without quotes, commas or underscores."
    ),
    "training:\n  epochs: 0\n": (
        "r.yaml, line 6: training.epochs must be a number above 0, or auto, not 0."
    ),
    "training:\n  batch_size: 4.0\n": (
        "r.yaml, line 6: training.batch_size must be a whole number of at least 1, or auto, not 4; "
        "write 4."
    ),
    "training:\n  max_steps: 1_000\n": 'a whole number of at least 1, or null, not "1_000"; write',
    "training:\n  batch_size: true\n": "a whole number of at least 1, or auto, not true.",
    "training:\n  learning_rate:\n": "must be a number above 0, or auto, not empty.",
    "lora:\n  lora_dropout: 1.0\n": (
        "r.yaml, line 6: lora.lora_dropout must be a number of at least 0 and below 1, not 1."
    ),
    "evaluation:\n  prompts: 51\n": (
        "r.yaml, line 6: evaluation.prompts must be a whole number from 0 to 50, not 51."
    ),
    "training:\n  gradient_checkpointing: on\n": (
        "r.yaml, line 6: training.gradient_checkpointing must be true, false or auto, "
        'not "on"; write true.'
    ),
    "title: 2024\n": "r.yaml, line 5: title must be text or null, not 2024; put it in quotes.",
    "precision: bfloat16\n": (
        "r.yaml, line 5: precision must be bf16, fp16, fp32 or auto, not "
        '"bfloat16"; here that is bf16.'
    ),
    "training:\n  lr_scheduler: cosin\n": (
        "r.yaml, line 6: training.lr_scheduler must be cosine, linear or constant, not "
        '"cosin"; did you mean cosine?'
    ),
    "training:\n  optimizer: adamw_torch\n": 'not "adamw_torch"; here that is adamw.',
    "lora:\n  target_modules: q_proj\n": (
        "r.yaml, line 6: lora.target_modules must be a list of names, or a regular expression for "
        "whole names, not "
        '"q_proj"; write [q_proj].'
    ),
    "lora:\n  target_modules:\n    - q_proj\n    - 7\n": (
        "r.yaml, line 8: lora.target_modules[2] must be text that is not empty, not 7."
    ),
    "lora:\n  target_modules: []\n": "or a list of names, not an empty list.",
    "report:\n  loss_at_steps: [10, 0]\n": (
        "r.yaml, line 6: report.loss_at_steps[2] must be a whole number of at least 1, not 0."
    ),
    "quantization:\n  block_size: 65\n": ("must be 64, 128, 256, 512, 1024, 2048 or 4096, not 65."),
    "seed: 2147483648\n": "a whole number of at least 0 and below 2,147,483,648, not 2147483648.",
    # numbers that are none
    "training:\n  learning_rate: .inf\n": (
        "r.yaml, line 6: training.learning_rate is '.inf', which is not a number that a setting "
        "can take."
    ),
    "training:\n  learning_rate: 1e999\n": "6: training.learning_rate is '1e999', which is not",
    f"seed: {'9' * 5000}\n": "line 5: seed is '9999",
    # YAML that is none, or too much
    "training:\n\tepochs: 3\n": (
        "r.yaml, line 6: not valid YAML: a tab cannot indent a line; use spaces."
    ),
    "title: a: b\n": (
        "r.yaml, line 5: not valid YAML: a colon that is not after a key; put the text that holds "
        "it in quotes."
    ),
    "lora: {r: 8\n": "not valid YAML: ",
    "---\nseed: 1\n": "r.yaml, line 5: a second document begins; a recipe is one document.",
    "title: &t x\nauthor: *t\n": (
        "r.yaml, line 6: *t is a YAML alias, which recipes do not use; write the value out."
    ),
    "title: !!python/object/apply:os.system [ls]\n": "title must be text or null, not a list.",
    "title: !secret x\n": "line 5: title has the YAML tag '!secret', which recipes do not use",
    'title: "\\ud800"\n': "line 5: the text holds half a character",
    'title: "\\UFFFFFFFF"\n': "r.yaml is not YAML that can be read: ",
    "title: a\x07b\n": "r.yaml, line 5: the character '\\x07' may not stand in YAML; remove it.",
    "title: " + "[" * 5000 + "\n": "line 5: this is nested too deep for a recipe.",
}


def sentence(text: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml", overrides)
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith((".", "?"))
    return said


@pytest.mark.parametrize("added", WRONG)
def test_a_wrong_recipe_says_what_where_and_what_was_meant(added: str) -> None:
    assert WRONG[added] in sentence(GOOD + added)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model:\n  name: m\n", "r.yaml: data.path is missing. It is needed: a JSON, JSONL, CSV"),
        ("data: {path: d}\n", "r.yaml: model.name is missing. It is needed: hub name"),
        ("model:\ndata: {path: d}\n", "r.yaml: model.name is missing."),
        ("model: {name: ''}\ndata: {path: d}\n", "model.name must be text that is not empty"),
        ("", "r.yaml is empty; a recipe needs at least model.name and data.path"),
        ("# nothing\n", "r.yaml is empty;"),
        ("- a\n- b\n", "r.yaml holds a list and not settings such as `seed: 42`."),
        ("text\n", "r.yaml holds a single value and not settings"),
        (
            "model: {name: m}\ndata:\n  path: d\n  template: aplaca\n",
            "r.yaml, line 4: data.template must be auto, chat, alpaca or plain, or the text of a "
            "row with {output} in it.",
        ),
        # the first of several mistakes is told, and a wrong value before a missing one
        ("training:\n  epochs: 0\n  batch_size: 0\n", "r.yaml, line 2: training.epochs"),
    ],
)
def test_a_recipe_that_lacks_something_says_what(text: str, said: str) -> None:
    assert said in sentence(text)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "training.max_step=3",
            "--set training.max_step=3: training.max_step is not a setting; did",
        ),
        ("lora_r=8", "--set lora_r=8: lora_r is not a setting; here it is called lora.r."),
        ("lora.r=0", "--set lora.r=0: lora.r must be a whole number of at least 1, not 0."),
        ("lora.r", "--set lora.r is not of the form section.key=value."),
        ("=3", "--set =3 is not of the form section.key=value."),
        ("lora=8", "--set lora=8: lora is a section; set one of its settings, such as lora.r=…."),
        ("lora={s: 1}", "--set lora={s: 1}: lora.s is not a setting"),
        ("lora.r=[", "--set lora.r=[: the value is not valid YAML: "),
        ("data={columns: 3}", "data.columns is a section; it takes {key: value}."),
        ("epochs=3", "epochs is not a setting; epochs belongs elsewhere: training.epochs."),
    ],
)
def test_a_wrong_override_is_named_in_place_of_the_line(override: str, said: str) -> None:
    assert said in sentence(GOOD, (override,))


def test_overrides_take_yaml_and_text_as_it_is() -> None:
    recipe = parse_recipe(
        GOOD + "training:\n  max_steps: 9\n  epochs: 0\n",
        "r.yaml",
        [
            "training.max_steps=null",
            "training.epochs=1.5",
            "training.learning_rate=2e-4",
            "data.columns.output=answer",
            "lora.target_modules=[q_proj, v_proj]",
            "lora={r: 4, lora_alpha: 8}",
            "lora.r=5",
            "title=Q: what # now?",
            "author=42",
            'objective="two\\nlines"',
            "data.template={input}=>{output}",
            "precision=auto",
        ],
    )
    assert recipe.training.max_steps is None
    assert recipe.training.epochs == 1.5
    assert recipe.training.learning_rate == 2e-4
    assert recipe.data.columns.output == "answer"
    assert {
        "r": 5,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
    }.items() <= recipe.lora.model_dump().items()
    assert (recipe.title, recipe.author) == ("Q: what # now?", "42")
    assert recipe.objective == "two\nlines"
    assert recipe.data.template == "{input}=>{output}"


def test_yaml_is_read_without_the_surprises_of_1_1() -> None:
    recipe = parse_recipe(
        "title: no\nauthor: 12:30\nobjective: 2024-01-01\nseed: 010\n"
        "model: {name: on, revision: 1_000}\ndata: {path: yes, split: =}\n"
        "training:\n  learning_rate: 1e-4\n  adam_epsilon: 1.E-8\n  weight_decay: 1\n  epochs: 3\n"
        "quantization:\n# all of it commented out\n",
        "r.yaml",
    )
    assert (recipe.title, recipe.author, recipe.objective) == ("no", "12:30", "2024-01-01")
    assert (recipe.model.name, recipe.model.revision) == ("on", "1_000")
    assert (recipe.data.path, recipe.data.split, recipe.seed) == ("yes", "=", 10)
    assert recipe.training.learning_rate == 1e-4
    assert recipe.training.adam_epsilon == 1e-8
    assert recipe.training.weight_decay == 1.0
    assert recipe.training.epochs == 3
    assert recipe.quantization.block_size == 64


def test_every_foreign_name_leads_to_a_setting_and_hides_none() -> None:
    assert len(NAMES) >= 60
    assert set(NAMES.values()) <= settings().keys()
    own = {s.name for s in settings().values()} | {s.rpartition(".")[2] for s in sections()}
    assert not own & (NAMES.keys() | NOT_SETTINGS.keys())
    assert not NAMES.keys() & NOT_SETTINGS.keys()
    for key, values in VALUES.items():
        assert set(values.values()) <= set(settings()[key].names)
    for name, key in NAMES.items():
        for text in (
            f"{name}: 1\n",
            f"lora:\n  {name}: 1\n",
            f"data:\n  columns:\n    {name}: 1\n",
        ):
            assert f"here it is called {key}." in sentence(text)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    def said(path: Path | str) -> str:
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        return str(caught.value)

    (tmp_path / "a.yaml").write_text(GOOD)
    assert "does not exist; check its name" in said(tmp_path / "b.yaml")
    assert "is a folder and not a recipe; it holds a.yaml." in said(tmp_path)
    assert "cannot be read: Not a directory." in said(tmp_path / "a.yaml" / "b.yaml")
    assert "is not a file name." in said("a\0b")
    (tmp_path / "latin.yaml").write_bytes(GOOD.encode() + "title: Müller\n".encode("latin-1"))
    assert "latin.yaml, line 5: this is not UTF-8; save it as UTF-8." in said(
        tmp_path / "latin.yaml"
    )
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    assert "is larger than 1 MB" in said(tmp_path / "large.yaml")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert Recipe.load(tmp_path / "bom.yaml", ["seed=7"]).seed == 7
