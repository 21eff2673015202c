"""From YAML and overrides to a recipe, or to one sentence that says what is wrong and where."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr, ValidationError

from halfbyte.errors import RecipeError
from halfbyte.recipe.names import check_names
from halfbyte.recipe.overrides import apply_override
from halfbyte.recipe.schema import RecipeFields
from halfbyte.recipe.secret_values import find_secret, secret_found
from halfbyte.recipe.settings import item_sections, sections, settings
from halfbyte.recipe.wrong_item import item_path, wrong_item
from halfbyte.recipe.wrong_value import wrong_value
from halfbyte.recipe.yaml_tree import Path as KeyPath
from halfbyte.recipe.yaml_tree import Tree, read_tree

MAX_BYTES = 1_000_000


class Recipe(RecipeFields):
    """One fine-tuning run: what the user asked for, or what it came to."""

    _file: Path | None = PrivateAttr(default=None)

    @property
    def file(self) -> Path | None:
        """The file that ``load`` read it from, beside which relative paths are looked for too."""
        return self._file

    def __eq__(self, other: object) -> bool:
        """The same settings, whatever file they are from."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe in a YAML file, with ``section.key=value`` overrides put in.

        Raises RecipeError, one sentence with file and line, for whatever is wrong with it.
        """
        recipe = load_recipe(path, overrides)
        recipe._file = Path(path)
        return recipe


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the file ``path`` with ``overrides`` (``section.key=value``) put in.

    Raises RecipeError, one sentence, for a file that is missing, not to be read, not UTF-8, empty
    or too large, and for whatever ``parse_recipe`` refuses.
    """
    return parse_recipe(_read(Path(path)), str(path), overrides)


def parse_recipe(text: str, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that ``text`` (YAML) holds; ``name`` is the file's, for errors.

    A value of an override is YAML too, and text for a setting that takes text. Raises RecipeError
    with file and line (or the override) for the first thing that is wrong: YAML that cannot be
    read, an unknown key, a wrong type, a value out of range, a key that is missing.
    """
    tree = read_tree(text, name)
    if tree.values is None:
        raise RecipeError(
            f"{name} is empty; a recipe needs at least model.name and data.path "
            "(halfbyte init my.csv writes one)."
        )
    if not isinstance(tree.values, dict):
        what = "a list" if isinstance(tree.values, list) else "a single value"
        raise RecipeError(f"{name} holds {what} and not settings such as `seed: 42`.")
    check_names(tree)
    _fill_empty_sections(tree)
    for override in overrides:
        apply_override(tree, override)
    return _validated(tree, name)


def _validated(tree: Tree, name: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(tree.values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    else:
        secret = find_secret(recipe)
        if secret is not None:
            raise RecipeError(f"{tree.place(secret) or name}: {secret_found(secret)}")
        return recipe
    # A group in a list is an item that somebody wrote: what it lacks is wrong with it.
    wrong = [p for p in problems if p["type"] != "missing" or item_path(_path(tree, p))]
    if not wrong:
        key = ".".join(str(part) for part in problems[0]["loc"])
        key = {"model": "model.name", "data": "data.path"}.get(key, key)
        description = settings()[key].description.rstrip(".")
        raise RecipeError(f"{name}: {key} is missing. It is needed: {_lower(description)}.")
    # Of what is said of one setting, what is said of an item in it is the most exact.
    paths = [_path(tree, problem) for problem in wrong]
    at = min(range(len(wrong)), key=lambda i: (tree.order(_setting(paths[i])), -len(paths[i])))
    path, first = paths[at], wrong[at]
    tell = wrong_item if item_path(path) else wrong_value
    raise RecipeError(f"{tree.place(path) or name}: {tell(path, first)}")


def _path(tree: Tree, problem: Any) -> KeyPath:
    """The part of pydantic's location that is a path in the file: unions add parts to it."""
    if problem["type"] == "rule":  # a rule between settings names the one to look at
        return tuple(str(problem["ctx"]["key"]).split("."))
    path: KeyPath = ()
    value = tree.values
    for part in problem["loc"]:
        inside = isinstance(value, dict) and part in value
        if inside or (isinstance(value, list) and isinstance(part, int) and part < len(value)):
            value = value[part]
            path = (*path, part)
    return path


def _setting(path: KeyPath) -> KeyPath:
    item = item_path(path)
    return item or tuple(part for part in path if isinstance(part, str))


def _fill_empty_sections(tree: Tree) -> None:
    """A section with nothing in it, as after commenting its keys out, holds its defaults.

    So does a list of groups.
    """
    lists = [key for key in settings() if item_sections(key)]
    for key in [*sections(), *lists]:
        if not key:
            continue
        *above, name = key.split(".")
        holder = tree.values
        for part in above:
            holder = holder.get(part, {}) if isinstance(holder, dict) else {}
        if isinstance(holder, dict) and name in holder and holder[name] is None:
            holder[name] = [] if key in lists else {}


def _lower(sentence: str) -> str:
    first = sentence.split(maxsplit=1)[0]
    return sentence if first.isupper() and len(first) > 1 else sentence[:1].lower() + sentence[1:]


def _read(path: Path) -> str:
    try:
        if path.is_dir():
            inside = sorted(p.name for p in path.glob("*.y*ml"))[:5]
            tail = f"; it holds {', '.join(inside)}" if inside else ""
            raise RecipeError(f"{path} is a folder and not a recipe{tail}.")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(
            f"the recipe {path} does not exist; check its name, or write one with "
            "halfbyte init my.csv."
        ) from None
    except OSError as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error.strerror}.") from None
    except ValueError:  # a null byte in the name
        raise RecipeError(f"{str(path)!r} is not a file name.") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path} is larger than 1 MB, which no recipe is; is it the data file?")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}, line {line}: this is not UTF-8; save it as UTF-8.") from None
