"""lm-evaluation-harness on our model, compared with its own transformers model on PEFT's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from command_line import halfbyte
from evaluate_case import Oracle, write_lines
from halfbyte.errors import DataError, ModelError
from halfbyte.finished import harness_tasks
from halfbyte.finished.harness import Tasks, prepare_tasks, run_tasks
from halfbyte.finished.harness_model import make_language_model
from halfbyte.finished.harness_tasks import (
    fetched,
    guarded,
    require_harmless,
    require_tasks,
    task_manager,
)
from halfbyte.finished.opened import OpenedAdapter, open_adapter
from halfbyte.finished.variants import use_variant
from halfbyte.report import make_report
from page_reader import read_page
from talk_case import chatml, make_run

lm_eval = pytest.importorskip("lm_eval")

CHOICES = """\
task: numbers_by_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}, train: {rows}}}}}
test_split: test
training_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
TEXTS = """\
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
"""
ANSWERS = """\
task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{gold}}}}"
generation_kwargs: {{until: ["o"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Rows that datasets has read are kept for these tests alone."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("datasets_cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> OpenedAdapter:
    run = make_run(tmp_path_factory.mktemp("lm_eval") / "run", tiny_model, "chat")
    return open_adapter(run, device=request.param)


@pytest.fixture(scope="module")
def theirs(opened: OpenedAdapter, tiny_model: Path) -> Any:
    """The harness's own model over transformers and PEFT, in fp32."""
    from lm_eval.models.huggingface import HFLM

    peft = Oracle(opened, tiny_model).peft.float()
    longest = make_language_model(opened).max_length
    return HFLM(
        pretrained=peft,
        tokenizer=opened.tokenizer,
        backend="causal",
        batch_size=3,
        max_length=longest,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tasks")
    questions = [
        {
            "question": f"Say the number {n} in words. " * (1 + 5 * (n == 2)),
            "choices": [" one", " one and two", f" it is {n}, that is all"],
            "answer": n % 3,
            "gold": "one",
        }
        for n in range(6)
    ]
    rows = json.dumps(str(write_lines(made / "rows.jsonl", *questions)))
    texts = json.dumps(
        str(write_lines(made / "texts.jsonl", *({"text": "Ünö two. " * n} for n in (1, 9, 60))))
    )
    (made / "choices.yaml").write_text(CHOICES.format(rows=rows))
    (made / "answers.yaml").write_text(ANSWERS.format(rows=rows))
    (made / "texts.yaml").write_text(TEXTS.format(rows=texts))
    return made


def asked(kind: str, *pairs: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=place)
        for place, pair in enumerate(pairs)
    ]


@pytest.mark.parametrize("variant", ["base", "adapter"])
def test_likelihoods_are_those_of_the_harness(
    opened: OpenedAdapter, theirs: Any, variant: str
) -> None:
    ours = make_language_model(opened)
    pairs = [
        ("Say the number 3 in words.", " It is three."),
        ("Say the number 3 in words. ", "It is three."),
        ("", "one and two"),
        ("a", "b"),
        ("One.\n" * 90, " It is one. " * 3),
        (chatml("One"), "It is one.<|im_end|>"),
    ]
    texts = [("It is one and two. " * n,) for n in (1, 7, 40)]
    greedy = theirs.generate_until(asked("generate_until", ("One", {"max_gen_toks": 3})))
    pairs.append(("One", greedy[0]))
    with use_variant(opened, variant):
        found = ours.loglikelihood(asked("loglikelihood", *pairs))
        rolling = ours.loglikelihood_rolling(asked("loglikelihood_rolling", *texts))
    with theirs.model.disable_adapter() if variant == "base" else nullcontext():
        wanted = theirs.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
        their_rolling = theirs.loglikelihood_rolling(asked("loglikelihood_rolling", *texts))
    for (likelihood, greedy_here), (their_likelihood, greedy_there) in zip(
        found, wanted, strict=True
    ):
        assert likelihood == pytest.approx(their_likelihood, abs=1e-4)
        assert greedy_here == greedy_there
    assert rolling == pytest.approx(their_rolling, abs=1e-4 * 40)
    assert rolling == pytest.approx(their_rolling, rel=1e-5)


def test_texts_go_on_as_in_the_harness(opened: OpenedAdapter, theirs: Any) -> None:
    ours = make_language_model(opened)
    requests = asked(
        "generate_until",
        ("Say the number 3 in words.", {"until": ["o"], "max_gen_toks": 12}),
        ("One", {"until": "x", "max_gen_toks": 20, "do_sample": False, "temperature": 0.7}),
        ("One and", {"until": ["o"], "max_gen_toks": 12}),
    )
    found = ours.generate_until(requests)
    assert found == [text.rstrip("\ufffd") for text in theirs.generate_until(requests)]
    ignored: list[str] = []
    careful = make_language_model(opened, on_ignored=ignored.append)
    drawn = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12, "num_beams": 4}
    first, second = (careful.generate_until(asked("generate_until", ("One", drawn))) for _ in "ab")
    assert first == second, "the seed says what is drawn"
    assert set(ignored) == {"num_beams"}


def test_the_trained_format_is_rendered(opened: OpenedAdapter) -> None:
    ours = make_language_model(opened)
    said = [{"role": "user", "content": "One"}]
    assert ours.apply_chat_template(said) == chatml("One")
    begun = [*said, {"role": "assistant", "content": "It is"}]
    assert ours.apply_chat_template(begun, add_generation_prompt=False) == chatml("One") + "It is"


def test_tasks_give_the_figures_of_the_harness(
    opened: OpenedAdapter, theirs: Any, folder: Path
) -> None:
    from lm_eval import simple_evaluate

    names = ["numbers_by_choice", "texts", "answers"]
    tasks = Tasks(names, folder, num_fewshot=1)
    manager, wanted = prepare_tasks(tasks)
    assert wanted == []
    results = run_tasks(opened, tasks, manager, wanted)
    assert results.rows == {"numbers_by_choice": 6, "texts": 3, "answers": 6}
    for variant in ("base", "adapter"):
        with theirs.model.disable_adapter() if variant == "base" else nullcontext():
            wanted_results = simple_evaluate(
                model=theirs,
                tasks=names,
                task_manager=task_manager(folder, names),
                num_fewshot=1,
                bootstrap_iters=0,
                log_samples=False,
                random_seed=0,
                numpy_random_seed=0,
                torch_random_seed=0,
                fewshot_random_seed=0,
            )["results"]
        for figure in results.figures:
            metric = figure.metric.partition(" ")[0]
            here = figure.base if variant == "base" else figure.adapter
            assert here == pytest.approx(wanted_results[figure.task][f"{metric},none"], rel=1e-4)
    assert {figure.metric for figure in results.figures} >= {
        "acc",
        "word_perplexity",
        "exact_match",
    }
    assert json.loads(json.dumps(results.record))["results"]["base"].keys() == set(names)


def test_the_command_writes_what_it_shows(
    opened: OpenedAdapter, folder: Path, tmp_path: Path
) -> None:
    words = ("evaluate", opened.folder, "--device", "cpu", "--lm-eval-path", folder)
    done = halfbyte(
        *words, "--lm-eval", "numbers_by_choice,texts", "--limit", "2", "--lm-eval-chat"
    )
    written = json.loads((opened.folder / "evaluation" / "lm_eval.json").read_text())
    assert written["limit"] == 2
    assert written["chat_template"] is True
    accuracy = written["results"]["adapter"]["numbers_by_choice"]["acc,none"]
    assert f"{accuracy:.3f}" in done.stdout or f"{accuracy:.1%}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80 + len(str(opened.folder))
    page = read_page(opened.folder / "report.html")
    assert "Tasks of lm-evaluation-harness" in page.headings["h3"]
    (table,) = [table for table in page.tables if table[0][0] == "task"]
    (row,) = [row for row in table if row[0] == "numbers_by_choice"]
    assert row[2] == "2"
    assert row[4].startswith(f"{accuracy:.3f}")
    kept = opened.folder / "evaluation" / "lm_eval.json"
    whole = kept.read_text()
    kept.write_text(json.dumps(written | {"results": {"base": 1}}))
    assert "cannot be read" in make_report(opened.folder).markdown.read_text()
    kept.write_text(whole)
    as_json = halfbyte(*words, "--lm-eval", "answers", "--json", "--out", tmp_path / "out")
    assert json.loads(as_json.stdout)["tasks"] == ["answers"]
    assert (tmp_path / "out" / "lm_eval.json").exists()
    both = halfbyte(*words, "--lm-eval", "texts", "--data", "rows.jsonl", code=2)
    assert "in place of rows" in both.stderr
    assert "--lm-eval" in halfbyte("evaluate", opened.folder, "--num-fewshot", "1", code=2).stderr


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "task: a\nprocess_docs: !function utils.run\n", "!function"),
        ("a.yaml", "task: !!python/object/apply:os.system ['true']\n", "python"),
        ("a.yaml", "task: a\nclass: os.system\n", "names a class"),
        ("a.yaml", "include: ../../outside.yaml\n", "outside of"),
        ("a.yaml", "include: /etc/hostname\n", "outside of"),
        ("a.yaml", "include: _default\n", "!function"),
        ("a.yaml", "task: [\n", "cannot be read as YAML"),
        ("a.yaml", "[" * 100_000, "cannot be read"),
        ("a.txt", "", "holds no task"),
    ],
)
def test_a_folder_of_tasks_runs_no_code(tmp_path: Path, name: str, text: str, says: str) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / name).write_text(text)
    (folder / "_default").write_text("task: a\nprocess_docs: !function utils.run\n")
    with pytest.raises(DataError, match=says):
        require_harmless(folder)


def test_templates_are_filled_in_a_sandbox(
    opened: OpenedAdapter, folder: Path, tmp_path: Path
) -> None:
    hostile = CHOICES.format(rows=json.dumps(str(folder / "rows.jsonl"))).replace(
        "{{question}}", "{{ question.__class__.__mro__[1].__subclasses__() }}"
    )
    (tmp_path / "a.yaml").write_text(hostile)
    tasks = Tasks(["numbers_by_choice"], tmp_path)
    manager, wanted = prepare_tasks(tasks)
    with pytest.raises(DataError, match="numbers_by_choice"):
        run_tasks(opened, tasks, manager, wanted)


def test_no_program_is_fetched_as_a_metric(
    opened: OpenedAdapter, folder: Path, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    program = tmp_path / "evil"
    program.mkdir()
    (program / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    text = CHOICES.format(rows=json.dumps(str(folder / "rows.jsonl")))
    (tmp_path / "a.yaml").write_text(text.replace("metric: acc", f"metric: {program}"))
    tasks = Tasks(["numbers_by_choice"], tmp_path)
    manager, wanted = prepare_tasks(tasks)
    with pytest.raises(DataError, match="is a program of the hub"):
        run_tasks(opened, tasks, manager, wanted)
    assert not ran.exists()


def test_what_would_be_fetched_is_said(opened: OpenedAdapter, folder: Path, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    own = Path(lm_eval.__file__).parent / "tasks" / "arc"
    manager = TaskManager(include_path=str(own), include_defaults=False)
    (one,) = fetched(manager, ["arc_easy"])
    assert one.what == "allenai/ai2_arc (ARC-Easy)"
    assert len(fetched(manager, ["ai2_arc"])) == 2, "a tag is its tasks"
    with pytest.raises(DataError, match="did you mean arc_easy"):
        require_tasks(manager, ["arc_easi"])
    with pytest.raises(DataError, match=r"reads the data set allenai/ai2_arc .*--lm-eval-download"):
        run_tasks(opened, Tasks(["arc_easy"]), manager, [one])
    assert fetched(task_manager(folder, ["texts"]), ["texts"]) == []
    text = CHOICES.format(rows='"https://nowhere.invalid/rows.jsonl"')
    (tmp_path / "far.yaml").write_text(text)
    with pytest.raises(DataError, match=r"fetches https://nowhere.invalid.*--lm-eval-download"):
        prepare_tasks(Tasks(["numbers_by_choice"], tmp_path))


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_tasks.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"pip install 'halfbyte\[lm-eval\]'"):
        prepare_tasks(Tasks(["arc_easy"]))


def test_what_was_replaced_comes_back() -> None:
    import lm_eval.utils

    before = lm_eval.utils.env
    with guarded(download=False):
        assert lm_eval.utils.env is not before
    assert lm_eval.utils.env is before
