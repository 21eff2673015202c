"""Broken data sets are caught by name, good ones are not, and errors stop a run."""

from __future__ import annotations

import ast
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from audit_case import CONTEXT, make_models
from chat_case import FAMILIES, tokenizer_of
from halfbyte.data.audit.findings import find_all
from halfbyte.data.audit.lengths import histogram
from halfbyte.data.audit.subject import Subject
from halfbyte.data.batch import TokenizedRow
from halfbyte.data.example import Example, Message
from halfbyte.data.prepare import Prepared, prepare
from halfbyte.data.template import make_template
from halfbyte.data.tokenize import tokenize_rows
from halfbyte.errors import DataError
from halfbyte.recipe import Recipe
from halfbyte.recipe.data_schema import Acceptable, DataRecipe
from halfbyte.recipe.load import load_recipe
from halfbyte.run import rehearse
from halfbyte.run.look import look_at_data

ROOT = Path(__file__).resolve().parent.parent
BROKEN = Path(__file__).resolve().parent / "broken_data"
SETS = sorted(path.name for path in BROKEN.iterdir() if path.is_dir())
NEEDS_LIBRARY = {"near-duplicates": "datasketch", "second-language": "py3langid"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder, tiny_model)
    return folder


@pytest.fixture(scope="module")
def tokenizer(models: Path) -> Any:
    return AutoTokenizer.from_pretrained(models / "model")


def put(name: str, folder: Path, models: Path) -> Path:
    """The broken data set ``name`` with its models beside it; its recipe."""
    place = folder / name
    shutil.copytree(BROKEN / name, place)
    for model in models.iterdir():
        (place / model.name).symlink_to(model)
    return place / "recipe.yaml"


def found_in(prepared: Prepared) -> dict[str, Any]:
    return {
        one.name: {"severity": one.severity, "count": one.count, "rows": one.rows}
        for one in prepared.findings
    }


@pytest.mark.parametrize("name", SETS)
def test_each_broken_data_set_is_caught_by_name_and_for_nothing_else(
    name: str, tmp_path: Path, models: Path
) -> None:
    if name in NEEDS_LIBRARY:
        pytest.importorskip(NEEDS_LIBRARY[name])
    path = put(name, tmp_path, models)
    look = look_at_data(load_recipe(path), recipe_folder=path.parent)
    assert found_in(look.prepared) == json.loads((BROKEN / name / "found.json").read_text())
    for finding in look.prepared.findings:
        assert finding.text[-1] not in ".;"
        assert finding.todo[-1] not in ".;"
    seen = json.dumps([one.examples for one in look.prepared.findings])
    for private in ("holm@", "86 44 09", "9855", "1555", "219-09-9999"):
        assert private not in seen


def test_there_is_a_set_for_each_mistake() -> None:
    assert len(SETS) >= 12 + 1
    assert json.loads((BROKEN / "nothing" / "found.json").read_text()) == {}
    caught = {name for s in SETS for name in json.loads((BROKEN / s / "found.json").read_text())}
    assert caught >= set(get_args(Acceptable)) - {
        "refused-rows",
        "too-long",
        "unlearned-rows",
        "wrong-labels",
    }


@pytest.mark.parametrize("name", ["end-not-learned", "template-in-rows", "same-answers"])
def test_an_error_stops_a_run_unless_it_is_accepted_by_name(
    name: str, tmp_path: Path, models: Path
) -> None:
    path = put(name, tmp_path, models)
    heard: list[Any] = []
    with pytest.raises(DataError) as caught:
        rehearse(load_recipe(path), recipe_folder=path.parent, listeners=[heard.append])
    assert f"({name})" in str(caught.value)
    assert f"data.accept: [{name}]" in str(caught.value)
    assert [event.name for event in heard if event.kind == "found"] == [name]
    other = next(other for other in get_args(Acceptable) if other != name)
    with pytest.raises(DataError):
        rehearse(load_recipe(path, [f"data.accept=[{other}]"]), recipe_folder=path.parent)
    accepted = rehearse(load_recipe(path, [f"data.accept=[{name}]"]), recipe_folder=path.parent)
    [finding] = [event for event in accepted.events if event.kind == "found"]
    assert (finding.name, finding.accepted, finding.stops) == (name, True, False)


def test_warnings_stop_nothing(tmp_path: Path, models: Path) -> None:
    path = put("doubled-end", tmp_path, models)
    rehearsal = rehearse(load_recipe(path), recipe_folder=path.parent)
    assert [e.name for e in rehearsal.events if e.kind == "found"] == ["doubled-end"]


# ---- what is good ------------------------------------------------------------------------------


def test_the_rows_of_the_demo_are_good(smollm2_gguf: Path) -> None:
    path = ROOT / "src/halfbyte/demo/demo.yaml"
    look = look_at_data(load_recipe(path), recipe_folder=path.parent)
    assert [one.sentence for one in look.prepared.findings] == []


def test_real_medical_rows_are_good_but_for_what_is_damaged(
    smollm2_gguf: Path, shared: Path
) -> None:
    data = {"path": str(shared / "data" / "chatdoctor.json"), "limit": 500}
    recipe = Recipe.model_validate({"model": {"name": str(smollm2_gguf)}, "data": data})
    look = look_at_data(recipe)
    assert found_in(look.prepared) == {
        "broken-encoding": {"severity": "note", "count": 2, "rows": [31, 395]}
    }


# One more takes no answers without thoughts.
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"deepseek-r1-distill"}))
def test_no_family_of_models_finds_fault_with_good_rows(family: str, tmp_path: Path) -> None:
    data = {"path": str(BROKEN / "nothing" / "rows.jsonl"), "held_out": 0, "template": "chat"}
    recipe = Recipe.model_validate({"model": {"name": "x"}, "data": data})
    assert found_in(prepare(recipe, tokenizer_of(family), CONTEXT)) == {}


# ---- single checks -----------------------------------------------------------------------------


def subject(tokenizer: Any, rows: list[Example], tokenized: list[TokenizedRow], **data: Any) -> Any:
    recipe = DataRecipe(path="rows.jsonl", **data)
    template, _ = make_template(recipe, tokenizer)
    return Subject(
        data=recipe,
        rows=rows,
        tokenized=tokenized,
        held_out=[],
        tokenizer=tokenizer,
        template=template,
        max_length=CONTEXT,
    )


def rows_and_tokens(
    tokenizer: Any, count: int = 60, **data: Any
) -> tuple[list[Example], list[TokenizedRow]]:
    lines = (BROKEN / "nothing" / "rows.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    read = [json.loads(line) for line in lines]
    rows = [
        Example.question_and_answer(at, row["instruction"], "", row["output"])
        for at, row in enumerate(read)
    ]
    template, _ = make_template(DataRecipe(path="rows.jsonl", **data), tokenizer)
    segments = [template.segments(row, "answer") for row in rows]
    return rows, tokenize_rows(tokenizer, segments, range(len(rows)))


@pytest.mark.parametrize("shift", [-9, -4, 4, 9])
def test_labels_on_the_wrong_tokens_are_seen(tokenizer: Any, shift: int) -> None:
    rows, tokenized = rows_and_tokens(tokenizer)
    assert find_all(subject(tokenizer, rows, tokenized)) == []
    moved = [
        TokenizedRow(row.input_ids, np.roll(row.loss_mask, shift), row.row) for row in tokenized
    ]
    names = {one.name: one.severity for one in find_all(subject(tokenizer, rows, moved))}
    # Moved to the left, the learned tokens lose the answer's end; to the right, its beginning.
    assert names["wrong-labels"] == "error"


def test_rows_looked_at_are_spread_and_counted(tokenizer: Any) -> None:
    rows, tokenized = rows_and_tokens(tokenizer, 3)
    many = subject(tokenizer, rows * 1001, tokenized * 1001)
    assert len(many.looked_at) <= 1000
    assert many.looked_at[-1] >= 3003 - 4
    leaked = [Example.question_and_answer(0, row.asked, "", row.asked + row.answer) for row in rows]
    [found] = [
        one
        for one in find_all(subject(tokenizer, leaked * 1001, tokenized * 1001))
        if one.name == "prompt-in-answer"
    ]
    assert found.of == len(many.looked_at)
    assert "rows looked at" in found.text


# ---- the list of findings ----------------------------------------------------------------------


def named_in_code() -> dict[str, set[str]]:
    """Names of findings with the severities that the code gives them."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "src/halfbyte/data/audit").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr == "left_out":
                severities = {"error", "warning", "note"}
            elif node.func.attr == "found":
                constants = [n.value for n in ast.walk(node.args[1]) if isinstance(n, ast.Constant)]
                severities = {c for c in constants if isinstance(c, str)}
            else:
                continue
            name = node.args[0]
            assert isinstance(name, ast.Constant)
            found.setdefault(str(name.value), set()).update(severities)
    return found


def test_what_can_be_accepted_is_what_can_be_an_error() -> None:
    errors = {name for name, severities in named_in_code().items() if "error" in severities}
    assert errors == set(get_args(Acceptable))


def test_docs_list_every_finding_with_its_gravest_severity() -> None:
    text = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([a-z-]+)` \| (error|warning|note)", text, re.MULTILINE))
    gravest = {
        name: next(s for s in ("error", "warning", "note") if s in severities)
        for name, severities in named_in_code().items()
    }
    assert listed == gravest


# ---- any rows at all ---------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(max_size=60),
    st.sampled_from(
        ["", " ", "<|im_end|>", "### Instruction:\n### Response:", "\ud800", "a@b.co +47 22864409"]
    ),
    st.integers(0, 10**18).map(str),
)
MESSAGES = st.lists(
    st.builds(
        Message,
        role=st.sampled_from(["system", "user", "assistant", "tool"]),
        content=TEXTS,
        learn=st.sampled_from([None, True, False]),
        reasoning=st.none() | TEXTS,
    ),
    min_size=1,
    max_size=5,
).map(tuple)
EXAMPLES = st.one_of(
    st.builds(Example.question_and_answer, st.just(0), TEXTS, TEXTS, TEXTS),
    st.builds(Example, row=st.just(0), text=TEXTS),
    st.builds(Example, row=st.just(0), messages=MESSAGES),
)


@given(
    rows=st.lists(EXAMPLES, min_size=1, max_size=12),
    held_out=st.lists(EXAMPLES, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    thorough=st.booleans(),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_the_audit_takes_any_rows(
    tokenizer: Any, rows: list[Example], held_out: list[Example], seed: int, thorough: bool
) -> None:
    """Whatever the rows, the tokens and the mask, and however few: findings and no exception."""
    drawn = np.random.default_rng(seed)
    tokenized = []
    for _ in rows:
        length = int(drawn.integers(1, 20))
        ids = drawn.integers(0, 8, length).astype(np.int32)
        tokenized.append(TokenizedRow(ids, drawn.random(length) < 0.5, 0, int(drawn.integers(2))))
    template, _ = make_template(DataRecipe(path="rows.jsonl"), tokenizer)
    look = Subject(
        data=DataRecipe(path="rows.jsonl"),
        rows=rows,
        tokenized=tokenized,
        held_out=held_out,
        tokenizer=tokenizer,
        template=template,
        max_length=20,
        dropped={"empty answer": rows[:2]},
        thorough=thorough,
    )
    for finding in find_all(look):
        assert finding.count >= len(finding.rows)
        assert finding.sentence.endswith(".")


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=300))
@example([7])
@example([1, 5000])
def test_the_histogram_counts_every_row_once(lengths: list[int]) -> None:
    bins = histogram(lengths)
    assert len(bins) <= 16
    assert sum(one.rows for one in bins) == len(lengths)
    for one in bins:
        last = one.last if one.last is not None else max(lengths)
        assert one.rows == sum(one.first <= length <= last for length in lengths)
    for one, after in pairwise(bins):
        assert one.last is not None
        assert one.last + 1 == after.first
