"""The bill of materials, against CycloneDX's schema and what pip says is installed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from command_line import halfbyte
from halfbyte import Recipe, train
from halfbyte.report.sbom import EXTRAS, installed_packages
from run_records import MODEL, write_run

ROOT = Path(__file__).resolve().parent.parent
NOW = {"environment": {"packages": {"torch": version("torch"), "numpy": version("numpy")}}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("sbom") / "run", events=NOW)
    halfbyte("report", folder, "--sbom")
    return folder


def bill(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sbom.json").read_text(encoding="utf-8"))


def test_it_is_valid_by_the_schema_of_cyclonedx(run: Path) -> None:
    """Its schema, with those of SPDX's licences and of signatures that it refers to."""
    schema = pytest.importorskip("cyclonedx.schema")
    jsonschema, referencing = pytest.importorskip("jsonschema"), pytest.importorskip("referencing")
    folder = Path(schema.__file__).parent / "_res"
    known = {p.name: json.loads(p.read_text()) for p in folder.glob("*.SNAPSHOT.schema.json")}
    wanted = {
        f"http://cyclonedx.org/schema/{name.replace('.SNAPSHOT', '')}": (
            referencing.Resource.from_contents(text)
        )
        for name, text in known.items()
    }
    main = known["bom-1.6.SNAPSHOT.schema.json"]
    validator = jsonschema.Draft7Validator(
        main, registry=referencing.Registry().with_resources(wanted.items())
    )
    errors = [f"{e.json_path}: {e.message}" for e in validator.iter_errors(bill(run))]
    assert errors == []
    broken = bill(run)
    broken["components"][0]["licenses"] = [{"expression": 3}]
    assert not validator.is_valid(broken)


def test_it_lists_what_pip_says_is_needed(run: Path) -> None:
    """By a slow walk over what ``pip inspect`` prints."""
    pytest.importorskip("pip")
    inspected = json.loads(
        subprocess.run(
            [sys.executable, "-m", "pip", "inspect", "--local"], capture_output=True, check=True
        ).stdout
    )
    there = {normal(i["metadata"]["name"]): i["metadata"] for i in inspected["installed"]}
    environment = inspected["environment"]
    wanted = {("halfbyte", extra) for extra in ("", *EXTRAS)}
    while True:
        more = {
            (normal(name), inner)
            for package, extra in wanted
            for line in there[package].get("requires_dist", [])
            for name, inners in [needed(line, extra, environment)]
            if name and normal(name) in there
            for inner in ("", *inners)
        }
        if more <= wanted:
            break
        wanted |= more
    names = {package for package, _ in wanted} - {"halfbyte"}
    listed = {c["name"]: c for c in bill(run)["components"] if c["type"] == "library"}
    assert listed.keys() == names
    assert {n: c["version"] for n, c in listed.items()} == {n: there[n]["version"] for n in names}
    assert not listed.keys() & {"pytest", "ruff", "mypy", "trl", "cyclonedx-python-lib"}
    for name in names:
        if "license_expression" in there[name]:
            assert listed[name]["licenses"] == [{"expression": there[name]["license_expression"]}]
    assert bill(run)["metadata"]["component"]["name"] == "halfbyte"
    depends = {d["ref"]: d["dependsOn"] for d in bill(run)["dependencies"]}
    assert listed["numpy"]["purl"] in depends[listed["pandas"]["purl"]]


def needed(line: str, extra: str, environment: dict[str, str]) -> tuple[str, list[str]]:
    """Name and extras of a requirement, empty where its marker does not hold here."""
    condition = line.partition(";")[2].strip()
    names = {**environment, "extra": extra}
    if condition:
        # Versions compare as numbers, everything else as texts.
        def side(text: str) -> str:
            if re.fullmatch(r"python_(full_)?version", text):
                return str(tuple(map(int, environment["python_full_version"].split("."))))
            if re.fullmatch(r"['\"][0-9.]+['\"]", text):
                return str(tuple(int(n) for n in text[1:-1].split(".")))
            return repr(names[text]) if text in names else text

        words = re.findall(r"['\"][^'\"]*['\"]|\w+|[()<>=!~]+", condition)
        if not eval(" ".join(side(word) for word in words)):  # of packages that are installed
            return "", []
    match = re.match(r"([A-Za-z0-9._-]+)\s*(?:\[([^]]*)\])?", line)
    assert match is not None
    return match[1], [e.strip() for e in (match[2] or "").split(",") if e.strip()]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_same_packages_give_the_same_bytes_and_the_report_shows_them(run: Path) -> None:
    before = (run / "sbom.json").read_bytes()
    halfbyte("report", run, "--sbom")
    assert (run / "sbom.json").read_bytes() == before
    page = (run / "report.md").read_text(encoding="utf-8")
    assert "Bill of materials" in page
    assert re.search(rf"\| torch \| {re.escape(version('torch'))} \| \w", page)
    base = next(c for c in bill(run)["components"] if c["type"] == "machine-learning-model")
    assert base["name"] == MODEL.name


def test_the_packages_of_another_machine_are_not_made_up(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", events={"environment": {"packages": {"torch": "2.0.1"}}})
    said = halfbyte("report", folder, "--sbom", code=2).stderr
    assert f"made with torch 2.0.1 and here it is {version('torch')}" in said
    assert not (folder / "sbom.json").exists()


def test_a_run_writes_it_where_the_recipe_says_so(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    asked = {
        "model": {"name": str(tiny_model)},
        "data": {"path": str(tiny_rows)},
        "training": {"max_steps": 1},
        "evaluation": {"prompts": 0, "base_loss": False, "every_steps": 0},
        "report": {"sbom": True},
    }
    run = train(Recipe.model_validate(asked), out=tmp_path / "run", runs=tmp_path)
    assert {c["name"] for c in bill(run.folder)["components"]} >= {"torch", "transformers"}
    assert "Bill of materials" in run.report.read_text(encoding="utf-8")


def test_each_extra_is_known_here() -> None:
    """An extra for users that is added to pyproject.toml belongs into the bill as well."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE)) == {*EXTRAS, "test", "check"}
    assert "halfbyte" in installed_packages().found
