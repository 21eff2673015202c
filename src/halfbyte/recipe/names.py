"""Keys that are no settings, and the setting that was meant."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from halfbyte.errors import RecipeError
from halfbyte.recipe.foreign import NAMES, NOT_SETTINGS
from halfbyte.recipe.settings import join, names_in, sections, settings
from halfbyte.recipe.yaml_tree import Tree


def check_names(tree: Tree) -> None:
    """Raises RecipeError for the first key of ``tree`` that is no setting."""
    _check(tree, tree.values, "")


def _check(tree: Tree, values: dict[str, Any], section: str) -> None:
    known = names_in(section)
    for name, value in values.items():
        key = join(section, name)
        path = (*section.split("."), name) if section else (name,)
        if name not in known:
            raise RecipeError(f"{tree.place(path)}: {unknown_key(key)}")
        if key not in sections():
            continue
        if isinstance(value, dict):
            _check(tree, value, key)
        elif value is not None:
            raise RecipeError(
                f"{tree.place(path)}: {key} is a section; its settings "
                f"({', '.join(names_in(key)[:3])}, …) stand under it, indented."
            )


def unknown_key(key: str) -> str:
    """What to say of a dotted ``key`` that is none: the nearest one, or where it belongs."""
    section, _, name = key.rpartition(".")
    if key in settings() or key in sections():  # written with its dots, in one line of a file
        head, _, tail = key.partition(".")
        return f"{key} is written in two lines: `{head}:` and, indented under it, `{tail}:`."
    if name in NAMES:
        return f"{key} is not a setting; here it is called {NAMES[name]}."
    if name in NOT_SETTINGS:
        return f"{key} is not a setting: {NOT_SETTINGS[name]}."
    homes = [s.key for s in settings().values() if s.name == name]
    homes += [s for s in sections() if s.rpartition(".")[2] == name and s]
    if homes:
        where = " or ".join(f"{home}{_level(home)}" for home in homes)
        return f"{key} is not a setting; {name} belongs elsewhere: {where}."
    nearest = _nearest(section, name)
    if nearest:
        return f"{key} is not a setting; did you mean {nearest}?"
    if section in sections() and section:
        return f"{key} is not a setting; {section} takes {', '.join(names_in(section))}."
    return f"{key} is not a setting; the sections are {', '.join(s for s in sections() if s)}."


def _level(key: str) -> str:
    return "" if "." in key else " (at the top level)"


def _nearest(section: str, name: str) -> str:
    """The valid key most like ``name``: of its own section first, then of all."""
    if section in sections():
        close = get_close_matches(name, names_in(section), n=1, cutoff=0.7)
        if close:
            return join(section, close[0])
    everywhere = {s.name: s.key for s in reversed(settings().values())}
    everywhere |= {s.rpartition(".")[2]: s for s in sections() if s}
    close = get_close_matches(name, [*everywhere, *NAMES], n=1, cutoff=0.75)
    if close:
        return everywhere.get(close[0]) or NAMES[close[0]]
    head = section.partition(".")[0]
    if head and head not in sections():  # training.epochs under a mistyped section
        near = get_close_matches(head, [s for s in sections() if s], n=1, cutoff=0.6)
        if near and name in names_in(near[0]):
            return join(near[0], name)
    return ""
