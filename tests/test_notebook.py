"""The Colab notebook, run from its first cell to its last with the demo's model and rows."""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import ROOT
from halfbyte import Recipe
from halfbyte.events import read_events
from halfbyte.events.types import Evaluated, Step
from halfbyte.recipe.load import parse_recipe
from halfbyte.recipe.write import dump_recipe

NOTEBOOK = ROOT / "notebooks" / "colab_t4.ipynb"
DEMO = ROOT / "src" / "halfbyte" / "demo"
STEPS = 3

# A few tokens and rows of the demo: what is tested is the notebook.
SMALL = (
    f"data.path={DEMO / 'lighthouse.jsonl'}",
    "data.held_out=4",
    "training.batch_size=2",
    "training.logging_steps=2",
    "evaluation.every_steps=2",
    "evaluation.prompts=1",
    "evaluation.max_new_tokens=8",
)


def read() -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def text_of(cell: nbformat.NotebookNode) -> str:
    """All that a cell printed."""
    return "".join(o.text for o in cell.outputs if o.output_type == "stream")


def html_of(cell: nbformat.NotebookNode) -> str:
    return "".join(o.data.get("text/html", "") for o in cell.outputs if "data" in o)


def test_the_notebook_is_thin_and_holds_no_output() -> None:
    notebook = read()
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        assert cell.outputs == []
        assert cell.execution_count is None
        if cell.id != "recipe":
            assert len(cell.source.splitlines()) <= 25, cell.id


def test_the_recipe_in_the_notebook_is_the_shipped_one() -> None:
    (cell,) = (cell for cell in read().cells if cell.id == "recipe")
    magic, text = cell.source.split("\n", 1)
    assert magic == "%%writefile tinyllama-chatdoctor.yaml"
    shipped = Recipe.load(ROOT / "recipes" / "tinyllama-chatdoctor.yaml")
    assert parse_recipe(text, "the notebook") == shipped


@pytest.fixture(scope="module")
def executed(
    smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nbformat.NotebookNode, Path]:
    """The notebook after all its cells have run, and the run folder."""
    folder = tmp_path_factory.mktemp("notebook")
    recipe = folder / "demo.yaml"
    recipe.write_text(dump_recipe(Recipe.load(DEMO / "demo.yaml", SMALL)))
    notebook = read()
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    for name, value in {
        "RECIPE": str(recipe),
        "OUT": str(folder / "run"),
        "MAX_STEPS": STEPS,
        "QUESTION": "Why is the sea salt?",
    }.items():
        parameters.source, found = re.subn(
            rf"^{name} = .*$", f"{name} = {value!r}", parameters.source, flags=re.MULTILINE
        )
        assert found == 1, name
    environment = {
        # `!halfbyte` and `%pip` are those of this interpreter, and neither asks the network:
        # pip finds everything installed, or fails.
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_TOKEN": "",
        # Threads that wait for each other lose much where tests run side by side.
        "OMP_NUM_THREADS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        client = NotebookClient(
            notebook,
            timeout=300,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
        )
        client.execute()
    return notebook, folder / "run"


def test_every_cell_does_its_part(executed: tuple[nbformat.NotebookNode, Path]) -> None:
    notebook, folder = executed
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert "ERROR" not in text_of(cells["install"])
    assert "torch" in text_of(cells["doctor"]).lower()
    assert "not on Colab" in text_of(cells["token"])
    assert (folder.parent / "tinyllama-chatdoctor.yaml").exists()

    events = [record.event for record in read_events(folder)]
    losses = [e.loss for e in events if isinstance(e, Step)]
    assert len(losses) == STEPS
    assert "loss" not in text_of(cells["train"]), "a table, not lines"
    table = html_of(cells["train"])
    rows = [re.findall(r"<td[^>]*>(?:<b>)?([^<]*)", row) for row in table.split("<tr>")[2:]]
    held_out = [f"{e.loss:.4f}" for e in events if isinstance(e, Evaluated) and e.what != "base"]
    assert [row[0] for row in rows] == ["0", "2", "3"]
    logged = ["", f"{sum(losses[:2]) / 2:.4f}", f"{losses[2]:.4f}"]
    assert [row[2] for row in rows] == logged
    assert [row[3] for row in rows] == held_out
    assert f"finished {STEPS} steps" in table

    assert len(text_of(cells["chat"]).split()) > 3
    assert html_of(cells["report"]).startswith("<iframe srcdoc=")
    assert "lighthouse" in html_of(cells["report"])
    names = zipfile.ZipFile(folder.with_name("run.zip")).namelist()
    assert {"run/adapter/adapter_model.safetensors", "run/report.html"} < set(names)
    assert not [name for name in names if "checkpoints" in name]
