"""The settings reference and the JSON schema, made from the recipe's models.

``python -m halfbyte.recipe.reference`` writes them into ``docs/``; a test says when they are old.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from halfbyte.recipe.schema import RecipeFields
from halfbyte.recipe.section import Section
from halfbyte.recipe.settings import (
    Setting,
    item_sections,
    sections,
    settings,
    settings_of,
    tag_of,
)

SETTINGS_FILE = "settings.md"
SCHEMA_FILE = "recipe.schema.json"

_HEAD = """# Settings

What a recipe can state. Each setting has its place in a section (`training.epochs` is `epochs:`
under `training:`) and can be given on the command line as `--set training.epochs=2`. What is left
out has its default; `auto` is decided for the run, and `halfbyte recipe RECIPE.yaml` shows what it
comes to and why. A key that is none is an error which names the nearest one.

Only `model.name` and `data.path` are needed. Editors complete and check recipes by
[recipe.schema.json](recipe.schema.json); with the YAML language server, put its path into the
first line: `# yaml-language-server: $schema=docs/recipe.schema.json`.

This page is generated: `python -m halfbyte.recipe.reference`.
"""


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of recipes.

    An empty section is taken for one with its defaults, as the reader takes it.
    """
    schema = RecipeFields.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Recipe of halfbyte"
    schema["description"] = "What to fine-tune, on which rows, and how."
    for definition in [schema, *schema["$defs"].values()]:
        for name, part in definition["properties"].items():
            part.pop("title", None)
            if "$ref" in part and name not in definition.get("required", []):
                definition["properties"][name] = {
                    "description": _about(schema, part["$ref"]),
                    "anyOf": [{"$ref": part["$ref"]}, {"type": "null"}],
                }
    return schema


def settings_reference() -> str:
    """A page of markdown with a table for each section."""
    parts = [_HEAD]
    for key, model in sections().items():
        own = [setting for setting in settings().values() if setting.section == key]
        parts.append(f"## {f'`{key}`' if key else 'At the top level'}\n")
        if key:
            parts.append(f"{_first_line(model)}\n")
        parts.append("| setting | takes | default | |\n| --- | --- | --- | --- |")
        parts.append("\n".join(_row(setting) for setting in own) + "\n")
        for setting in own:
            parts += [_group(setting.key, kind) for kind in item_sections(setting.key)]
    return "\n".join(parts)


def _group(key: str, kind: type[Section]) -> str:
    """The table of what one group of settings in the list at ``key`` takes."""
    tag = tag_of(kind)
    title = f"### `{key}`: each item" if tag is None else f"### `{key}`: `filter: {tag}`"
    rows = [_row(s, s.key) for s in settings_of(kind) if s.name != "filter"]
    about = str(kind.__doc__).strip().replace("\n    ", "\n")
    return (
        "\n".join(
            [
                title,
                "",
                about,
                "",
                "| setting | takes | default | |",
                "| --- | --- | --- | --- |",
                *rows,
            ]
        )
        + "\n"
    )


def write_reference(folder: Path) -> None:
    """Write both files into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS_FILE).write_text(settings_reference(), encoding="utf-8")
    (folder / SCHEMA_FILE).write_text(schema_text(), encoding="utf-8")


def schema_text() -> str:
    """``json_schema`` as it stands in its file."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def _about(schema: dict[str, Any], reference: str) -> str:
    return str(schema["$defs"][reference.rpartition("/")[2]]["description"]).splitlines()[0]


def _first_line(model: type) -> str:
    return str(model.__doc__).splitlines()[0]


def _row(setting: Setting, name: str = "") -> str:
    default = "needed" if setting.required else f"`{_default(setting.default)}`"
    return f"| `{name or setting.name}` | {setting.wanted} | {default} | {setting.description} |"


def _default(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


if __name__ == "__main__":
    write_reference(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
