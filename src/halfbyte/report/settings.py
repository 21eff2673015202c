"""Settings as asked and as effective, each with where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from halfbyte.events.types import Choice
from halfbyte.recipe.settings import get, item_sections
from halfbyte.recipe.settings import settings as known_settings
from halfbyte.report import figures
from halfbyte.report.story import Story, flatten

# What the recipe says about the run rather than to it; the report shows it elsewhere.
WORDS = ("title", "author", "objective")


# What may lie beside the recipe, and is then written as it was found.
_PATHS = ("model.name", "data.path", "data.held_out_path")


@dataclass(frozen=True)
class Setting:
    key: str
    asked: str  # a dash where the recipe does not say
    effective: str
    reason: str


def settings(story: Story) -> list[Setting]:
    """Every setting of the recipe in its order, then what was decided beside it."""
    effective = flatten(story.recipe.model_dump())
    for key in filter(item_sections, effective):  # groups in a list, as they were stated
        groups = get(story.recipe, key)
        effective[key] = [group.model_dump(exclude_defaults=True) for group in groups]
    typed = _typed(story)
    rows = [
        Setting(
            key,
            _asked(story, key),
            figures.setting(_done(story, key, value)),
            _reason(story, key, value, key in typed),
        )
        for key, value in effective.items()
        if key not in WORDS
    ]
    rows += [
        Setting(key, _said(c), figures.setting(c.value), c.reason)
        for key, c in story.choices.items()
        if key not in effective
    ]
    return rows


def _done(story: Story, key: str, value: Any) -> Any:
    """A setting that the recipe leaves open even now, such as a column's name, as it was chosen."""
    choice = story.choices.get(key)
    return choice.value if choice is not None and value in (None, "auto") else value


def _asked(story: Story, key: str) -> str:
    if key in story.asked:
        return figures.setting(story.asked[key])
    choice = story.choices.get(key)
    return figures.NONE if choice is None else _said(choice)


def _said(choice: Choice) -> str:
    return figures.NONE if choice.asked is None else figures.setting(choice.asked)


def _reason(story: Story, key: str, value: Any, typed: bool) -> str:
    choice = story.choices.get(key)
    if choice is not None:
        return choice.reason
    if typed:
        return "as typed on the command line"
    if key in story.asked and _same(story.asked[key], value):
        return "as asked"
    if key in story.asked and key in _PATHS:
        return "as asked, where it was found"
    if key in known_settings() and _same(known_settings()[key].default, value):
        return "default"
    return "decided by the run"


def _typed(story: Story) -> set[str]:
    """Keys that the first process's command line states."""
    if not story.processes:
        return set()
    words = story.processes[0].started.command
    keys = set()
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word == "--set":
            keys.add(following.split("=", 1)[0])
        elif word.startswith("--set="):
            keys.add(word.removeprefix("--set=").split("=", 1)[0])
        elif word.split("=", 1)[0] == "--max-steps":
            keys.add("training.max_steps")
    return keys


def _same(asked: Any, effective: Any) -> bool:
    """Whether ``effective`` is what was asked; of groups in a list what was left out is open."""
    if isinstance(asked, list) and isinstance(effective, list) and len(asked) == len(effective):
        return all(_same(one, other) for one, other in zip(asked, effective, strict=True))
    if isinstance(asked, dict) and isinstance(effective, dict):
        return all(name in effective and _same(v, effective[name]) for name, v in asked.items())
    try:
        return bool(float(asked) == float(effective))
    except (TypeError, ValueError):
        return bool(asked == effective)
