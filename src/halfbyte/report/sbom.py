"""A software bill of materials: every package that a run was made with, as CycloneDX 1.6.

It is read from what is installed, so it can only be written where the run's packages are: at the
run's end (``report.sbom``), or later while they are still the same.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from halfbyte.errors import RunError
from halfbyte.report.make import write_whole
from halfbyte.report.story import SBOM_FILE, Story, read_story

PACKAGE = "halfbyte"
# What a user installs beside the package's own needs; tests and checks take no part in a run.
EXTRAS = (
    *("clean", "tensorboard", "wandb", "mlflow"),
    *("lm-eval", "llama-cpp", "mlx", "compress"),
)

Component = dict[str, Any]
Needed = tuple[str, tuple[str, ...]]  # a package and which of its extras


def write_sbom(folder: Path) -> Path:
    """Write ``sbom.json`` into the run's folder; the same packages give the same bytes.

    Raises RunError where there is no run, and where a package that it recorded is installed in
    another version now.
    """
    story = read_story(folder)
    _require_same(story)
    path = folder / SBOM_FILE
    write_whole(path, (json.dumps(bill(story), indent=1, ensure_ascii=False) + "\n").encode())
    return path


def write_if_asked(folder: Path) -> None:
    """The same where the run's recipe says ``report.sbom`` and its packages are those here."""
    if read_story(folder).recipe.report.sbom:
        with suppress(RunError):  # a finished run that is only looked at, somewhere else
            write_sbom(folder)


def bill(story: Story) -> dict[str, Any]:
    """The bill of the packages that are installed, and of the base model."""
    packages = installed_packages()
    components = [_component(f) for name, f in packages.found.items() if name != PACKAGE]
    if story.model is not None:
        components.append(_base_model(story))
    own = _component(packages.found[PACKAGE]) | {"type": "application"}
    named = json.dumps([own, components], sort_keys=True)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, named)}",
        "version": 1,
        "metadata": {"component": own},
        "components": components,
        "dependencies": [
            {
                "ref": _url(found),
                "dependsOn": [_url(packages.found[n]) for n in packages.needs[name]],
            }
            for name, found in packages.found.items()
        ],
    }


@dataclass(frozen=True)
class Packages:
    """What is installed of halfbyte's needs, by normalized name, and who needs whom."""

    found: dict[str, Distribution]
    needs: dict[str, list[str]]


def installed_packages() -> Packages:
    """halfbyte and all that it needs, directly or not; of its extras those that are installed."""
    found: dict[str, Distribution] = {}
    needs: dict[str, set[str]] = {}
    waiting: list[Needed] = [(PACKAGE, EXTRAS)]
    seen: set[Needed] = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found[name] = found.get(name) or distribution(name)
        needed = _needs(found[name], extras)
        needs.setdefault(name, set()).update(other for other, _ in needed)
        waiting += needed
    return Packages(
        {name: found[name] for name in sorted(found)},
        {name: sorted(needs[name]) for name in sorted(found)},
    )


def licences(found: Distribution) -> list[dict[str, Any]]:
    """What a package says of its licence, as CycloneDX has it; empty where it says nothing."""
    told = found.metadata
    if "License-Expression" in told:
        return [{"expression": told["License-Expression"]}]
    classified = [
        text.rsplit(" :: ", 1)[-1]
        for text in told.get_all("Classifier") or []
        if text.startswith("License ::") and text != "License :: OSI Approved"
    ]
    plain = told["License"].strip() if "License" in told else ""
    # Some put the whole text there.
    names = classified or ([plain] if plain and len(plain) <= 80 and "\n" not in plain else [])
    return [{"license": {"name": name}} for name in names]


def _needs(found: Distribution, extras: tuple[str, ...]) -> list[Needed]:
    """What ``found`` with ``extras`` requires here and is installed: names, and their extras."""
    names = []
    for line in found.requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": e}) for e in ("", *extras)):
            continue
        name = _normal(requirement.name)
        try:
            distribution(name)
        except PackageNotFoundError:  # of an extra, or left out by whoever installed it
            continue
        names.append((name, tuple(sorted(requirement.extras))))
    return names


def _component(found: Distribution) -> Component:
    name, version = _normal(found.metadata["Name"]), found.version
    component: Component = {
        "type": "library",
        "bom-ref": _url(found),
        "name": name,
        "version": version,
        "purl": _url(found),
    }
    if stated := licences(found):
        component["licenses"] = stated
    if digests := _archive_hashes(found):
        component["hashes"] = digests
    record = found.read_text("RECORD")
    if record is not None:
        # pip writes the SHA-256 of each installed file into it.
        digest = hashlib.sha256(record.encode()).hexdigest()
        component["properties"] = [{"name": "halfbyte:sha256-of-RECORD", "value": digest}]
    return component


def _base_model(story: Story) -> Component:
    assert story.model is not None
    component: Component = {
        "type": "machine-learning-model",
        "bom-ref": "base-model",
        "name": story.model.name,
    }
    if story.recipe.model.revision:
        component["version"] = story.recipe.model.revision
    if story.model.licence:
        component["licenses"] = [{"license": {"name": story.model.licence}}]
    return component


def _archive_hashes(found: Distribution) -> list[dict[str, str]]:
    """The hash of the file that was installed, which pip keeps where it was named by a URL."""
    try:
        kept = json.loads(found.read_text("direct_url.json") or "{}")
        digests = kept.get("archive_info", {}).get("hashes", {})
        return [{"alg": "SHA-256", "content": digests["sha256"]}] if "sha256" in digests else []
    except (ValueError, AttributeError):
        return []


def _require_same(story: Story) -> None:
    recorded = story.environments[-1].packages if story.environments else {}
    for name, version in sorted(recorded.items()):
        try:
            now = distribution(name).version
        except PackageNotFoundError:
            now = "not installed"
        if now != version:
            raise RunError(
                f"the run was made with {name} {version} and here it is {now}, so its packages "
                "cannot be listed from here; do it where it was made, or set report.sbom before "
                "a run."
            )


def _url(found: Distribution) -> str:
    """The package URL (purl) of a package."""
    version = found.version.replace("+", "%2B")
    return f"pkg:pypi/{_normal(found.metadata['Name'])}@{version}"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
