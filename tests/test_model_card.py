"""Model cards: metadata that the hub's client reads, and names that stay text."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from halfbyte.errors import RunError
from halfbyte.evaluate.paired import Chance
from halfbyte.evaluate.resampling import Estimate
from halfbyte.evaluate.results import Figure, Results
from halfbyte.events import EventLog
from halfbyte.events.types import Audited, Evaluated, Kept, ModelLoaded
from halfbyte.export.card.derived_card import DerivedKind, derived_card
from halfbyte.export.card.licence import data_licences, licence_fields
from halfbyte.export.card.loading import with_place
from halfbyte.export.card.metadata import on_base
from halfbyte.export.card.model_card import model_card
from halfbyte.model.adapter_files import SavedAdapter
from halfbyte.recipe import Recipe
from halfbyte.recipe.schema import ModelRecipe
from halfbyte.recipe.subject import is_medical

BASE = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
LOADED = ModelLoaded(
    name=BASE,
    architecture="LlamaForCausalLM",
    parameters_base=1_100_048_384,
    parameters_trainable=4096,
    layers=22,
    bytes_before=1,
    bytes_after=1,
    bytes_other=1,
    bytes_copy=0,
    quantized_modules=154,
    lora_modules={"q_proj": 22, "v_proj": 22},
    source_format="safetensors",
    template_of_base=True,
    licence="apache-2.0",
)
AUDITED = Audited(
    source="someone/rows",
    rows_read=500,
    rows_used=475,
    rows_held_out=25,
    rows_shortened=0,
    rows_dropped={},
    template="chat",
    loss_on="answer",
    max_length=512,
    tokens=1,
    labels=1,
    length_percentiles={},
    sample=[],
    sample_row=0,
)
LOSSES = [
    Evaluated(0, "quantized base", 2.5, 100, 25, 1.0),
    Evaluated(5, "adapter", 1.25, 100, 25, 1.0),
    Evaluated(9, "adapter", 1.5, 100, 25, 1.0),
]
KEPT = Kept(5, "the lowest held-out loss", 1.25)


def recipe(**settings: Any) -> Recipe:
    given = {"model": {"name": BASE}, "data": {"path": "someone/rows"}, **settings}
    return Recipe.model_validate(given)


def card(made: Recipe | None = None, model: ModelLoaded = LOADED, **more: Any) -> str:
    given = {"evaluations": LOSSES, "kept": KEPT, "version": "1.2", **more}
    return model_card(made or recipe(), model=model, audit=AUDITED, **given)


def shape(text: str) -> list[str]:
    """The kinds of a card's blocks and spans in order, as CommonMark with tables reads it."""
    found = []
    for block in MarkdownIt("commonmark").enable("table").parse(ModelCard(text).text):
        found.append(block.type)
        found += [span.type for span in block.children or [] if span.type != "text"]
    return found


def test_the_hub_reads_what_it_says() -> None:
    text = card()
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == (BASE, "adapter")
    assert (data.license, data.datasets, data.library_name) == (
        *("apache-2.0", ["someone/rows"]),
        "peft",
    )
    (result,) = data.eval_results
    assert (result.metric_value, result.dataset_type) == (1.25, "someone/rows")  # the kept one
    for said in ("| base in 4 bits | 2.5000 |", "| adapter | 1.2500 |", "475 rows", "halfbyte 1.2"):
        assert said in text
    assert "Of the data: not stated." in text
    assert "medical" not in text
    parts = [line.lstrip("# ") for line in text.split("\n") if line.startswith("## ")]
    assert parts == [
        *("How to load it", "Results", "How it was trained"),
        *("Intended use", "Limits", "Licences"),
    ]
    blocks = MarkdownIt("commonmark").parse(text)
    (code,) = [b.content for b in blocks if b.type == "fence" and b.info == "python"]
    ast.parse(code)
    # Without figures there are none, and nothing else changes.
    bare = ModelCard(card(evaluations=[], kept=None)).data
    assert bare.eval_results is None
    nan = [replace(LOSSES[1], loss=float("nan"))]
    assert ModelCard(card(evaluations=nan, kept=None)).data.eval_results is None


def test_what_is_known_of_this_machine_stays_here(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    here = replace(LOADED, name=str(tmp_path / "base"))
    token = "hf_" + "abcd" * 8
    made = recipe(model={"name": here.name}, data={"path": str(rows)}, objective=f"With {token}.")
    text = card(made, here)
    assert str(tmp_path) not in text
    assert token not in text
    data = ModelCard(text).data
    assert data.base_model is None
    assert not data.datasets
    assert "halfbyte chat . --base BASE" in text


HOSTILE = [
    "---",
    "a\n---\nlicense: mit\n---\n# b",
    "x: [y, {z: &a *a}]",
    "```\n</details>\n# out\n````````",
    "<script>alert(1)</script> <!-- ",
    "[click](javascript:x) ![i](https://x/y.png) <https://x>",
    "a | b | c\n| --- |",
    "# x\r\n## y\u2028## z\x1b[31m\u202e",
    "1. one\n- two\n> three\n    four\n\t five",
    "{{ cookies }} ${HOME} $x^2$ `code` ~~gone~~ **b** __c__ @everyone &lt;",
    "'\"\\",
]


@settings(max_examples=40, deadline=None, database=None)
@given(
    st.one_of(st.sampled_from(HOSTILE), st.text(min_size=1, max_size=40)).filter(str.strip),
    st.sampled_from(["title", "objective", "template", "path", "why", "licence", "note"]),
)
def test_no_text_breaks_out(text: str, place: str) -> None:
    """Whatever a name holds, the card has the blocks that it has with a plain word there."""

    def made(word: str) -> str:
        data = {"path": word if place == "path" else "someone/rows"}
        if place == "template":
            data["template"] = f"{word} {{instruction}} {{output}}"
        named = {place: word} if place in ("title", "objective") else {}
        return card(
            recipe(data=data, title=named.get("title"), objective=named.get("objective")),
            replace(LOADED, licence=word if place == "licence" else "mit"),
            kept=replace(KEPT, why=word if place == "why" else "best"),
            facts={word: word} if place == "note" else {"a": "b"},
        )

    hostile, plain = made(text), made("word")
    assert shape(hostile) == shape(plain)
    found, known = ModelCard(hostile).data.to_dict(), ModelCard(plain).data.to_dict()
    assert found.keys() - {"license_name"} == known.keys() - {"license_name", "datasets"} | (
        {"datasets"} if "datasets" in found else set()
    )
    assert "\x1b" not in hostile
    hostile.encode()


@dataclass(frozen=True)
class Found:
    """What ``find_adapter`` gives, by hand."""

    adapter: Path
    run: Path | None
    recipe: Recipe | None
    base: ModelRecipe
    saved: SavedAdapter


def of_run(folder: Path) -> Found:
    with EventLog(folder) as log:
        for event in (LOADED, AUDITED, *LOSSES, KEPT):
            log(event)
    return Found(folder / "adapter", folder, recipe(), ModelRecipe(name=BASE), saved({}))


def saved(config: Mapping[str, Any]) -> SavedAdapter:
    pair = (torch.ones(4, 8), torch.ones(8, 4))
    return SavedAdapter({"model.layers.0.self_attn.q_proj": pair}, dict(config))


@pytest.mark.parametrize(
    ("kind", "relation", "library"),
    [
        ("merge", "finetune", "transformers"),
        ("quantized", "quantized", "gguf"),
        ("compressed", "quantized", "transformers"),
        ("mlx", "quantized", "mlx"),
        ("combination", "adapter", "peft"),
        ("adapter", "adapter", "peft"),
    ],
)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["run", "elsewhere"])
def test_cards_of_what_is_made_of_an_adapter(
    kind: DerivedKind, relation: str, library: str, elsewhere: bool, tmp_path: Path
) -> None:
    found = of_run(tmp_path)
    if elsewhere:
        found = replace(found, run=None, recipe=None, saved=saved({"use_dora": True}))
    text = derived_card(found, kind, {"onto": "4bit | <b>"}, file="it.gguf")
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == (BASE, relation)
    assert data.library_name == library
    assert ("gguf" in data.tags) == (kind == "quantized")
    assert ("qlora" in data.tags) == (not elsewhere)
    assert "| onto | 4bit \\| \\<b\\> |" in text
    assert ("it.gguf" in text) == (kind == "quantized")
    assert (data.eval_results is None) == elsewhere
    assert ("DoRA, r 4, on q\\_proj" in text) == elsewhere
    # The repository's name stands where this folder's did, or was there from the first.
    assert with_place(text, "org/it") == derived_card(
        found, kind, {"onto": "4bit | <b>"}, place="org/it", file="it.gguf"
    )


def test_what_an_evaluation_found_is_told(tmp_path: Path) -> None:
    found = of_run(tmp_path)
    before = derived_card(found, "adapter", {})
    figure = Figure(
        key="accuracy",
        name="token accuracy",
        group="answer_tokens",
        kind="share",
        lower_is_better=False,
        rows=25,
        base=Estimate(0.25, 0.2, 0.3),
        adapter=Estimate(0.5, 0.4, 0.6),
        difference=Estimate(0.25, 0.1, 0.4),
        chance=Chance(0.001, "sign-flip"),
    )
    results = Results({"rows": 25, "data": "/home/me/rows|.jsonl"}, {}, {}, [figure])
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps(results.as_json()))
    text = derived_card(found, "adapter", {})
    assert "25 rows of rows\\|.jsonl" in text
    assert "| token accuracy | 25.0 % (20.0–30.0) | 50.0 % (40.0–60.0) | the difference" in text
    (tmp_path / "evaluation" / "results.json").write_text('{"format": 1, "figures": 7}')
    assert derived_card(found, "adapter", {}) == before


def test_licences() -> None:
    assert licence_fields(None) == {}
    assert licence_fields("Apache-2.0") == {"license": "apache-2.0"}
    assert licence_fields("Llama 3.1: Community!") == {
        "license": "other",
        "license_name": "llama-3.1-community",
    }
    assert licence_fields("???") == {"license": "other"}
    # Those that the hub takes are short and in small letters.
    text = card(model=replace(LOADED, licence="My own\n---\n"))
    assert ModelCard(text).data.license == "other"


def test_licences_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def licence(*paths: object) -> str:
        return data_licences(recipe(data={"sources": [{"path": str(p)} for p in paths]}).data)

    saved_by_datasets, plain = tmp_path / "saved", tmp_path / "plain"
    for folder in (saved_by_datasets / "train", plain):
        folder.mkdir(parents=True)
    (saved_by_datasets / "train" / "dataset_info.json").write_text('{"license": "cc-by-4.0"}')
    (plain / "rows.jsonl").write_text("{}")
    assert licence(saved_by_datasets) == "cc-by-4.0"
    assert licence(plain / "rows.jsonl") == "not stated"
    (plain / "README.md").write_text("---\nlicense: odc-by\n---\n# Rows\n")
    assert licence(plain / "rows.jsonl") == "odc-by"
    assert licence(plain / "rows.jsonl", saved_by_datasets) == "odc-by, cc-by-4.0"
    # A model's card beside the rows says nothing of them.
    (plain / "README.md").write_text("---\nlicense: mit\nlibrary_name: peft\n---\n")
    assert licence(plain / "rows.jsonl") == "not stated"
    cached = tmp_path / "hub" / "datasets--someone--rows"
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc" / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert licence("someone/rows") == "cc0-1.0"
    assert licence("someone/others") == "not stated"


def test_the_base_of_a_card_of_others() -> None:
    theirs = "---\nbase_model: /home/me/base\ntags: [a]\n---\n\n# Text\n---\nmore\n"
    path = Path("README.md")
    named = on_base(theirs, BASE, path)
    assert ModelCard(named).data.base_model == BASE
    assert ModelCard(named).data.tags == ["a"]
    assert ModelCard(named).text.strip() == "# Text\n---\nmore"
    assert ModelCard(on_base(theirs, "/elsewhere", path)).data.base_model is None
    assert on_base(named, None, path) == named
    assert on_base("# No head\n", None, path).endswith("# No head\n")
    with pytest.raises(RunError, match="cannot be read"):
        on_base("---\na: [\n---\n", BASE, path)


@pytest.mark.parametrize(
    "text",
    [
        *("chatdoctor.json", "HealthCareMagic-100k", "lavita/medical-qa-datasets", "icliniq"),
        *("pubmed_qa", "bigbio/med_qa", "openlifescienceai/MedMCQA", "PubMedQA", "medalpaca"),
        *("Answer patients' questions", "clinical notes", "drug dosages", "mimic-iv", "wikidoc"),
        *("A nurse's hand-over", "mental health counselling", "radiology reports", "MedQuAD"),
    ],
)
def test_medicine_is_known(text: str) -> None:
    assert is_medical(text)
    assert "no medical advice" in card(recipe(objective=text))


@pytest.mark.parametrize(
    "text",
    [
        *("alpaca", "lighthouse.jsonl", "healthy recipes", "health checks of our servers"),
        *("A patient tutor", "be patient and polite", "doctoral theses", "Doctor Who scripts"),
        *("mediaeval history", "medium articles", "nursery rhymes", "surges in traffic"),
        *("impatient customers", "server_health.csv", "med-size models", "documentation"),
    ],
)
def test_other_subjects_are_not_taken_for_it(text: str) -> None:
    assert not is_medical(text)
