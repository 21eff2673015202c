"""Tasks of lm-evaluation-harness: found by name, looked through, and kept from doing harm.

A task is a YAML file. The harness reads it with a loader that runs what the file names, fills its
templates without a sandbox, and fetches metrics from the hub as programs. The tasks that come with
the package are as good as the package; those of a folder are a stranger's, and are refused where
they ask for more than data.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from halfbyte.errors import DataError, ModelError
from halfbyte.foreign_json import DEEPEST, read_small, too_deep

EXTRA = "halfbyte[lm-eval]"
# Loaders of datasets for files that lie somewhere, in place of a data set's name.
_FILE_KINDS = ("json", "csv", "parquet", "text", "arrow")
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Fetched:
    """A data set that a task reads from the hub or the network, if it is not here already."""

    task: str
    what: str


def require_harness() -> None:
    """Raises ModelError where the package lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ModelError(
            f"lm-evaluation-harness is not installed; pip install '{EXTRA}' brings it."
        )


def require_harmless(folder: Path) -> None:
    """Refuse a folder of tasks that would run code. Raises DataError, naming the file.

    Every YAML file in it, and what those include, may hold plain values alone: no tags (such as
    ``!function``), no classes, and nothing that is included from outside of the folder.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder} with tasks; mend --lm-eval-path.")
    root = folder.resolve()
    waiting = sorted({*root.glob("**/*.yaml"), *root.glob("**/*.yml")})
    if not waiting:
        raise DataError(f"{folder} holds no task (a YAML file); mend --lm-eval-path.")
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for included in _includes(path, root):
            target = Path(included)
            target = (target if target.is_absolute() else path.parent / target).resolve()
            if not target.is_relative_to(root):
                raise DataError(f"{path} includes {included}, which lies outside of {folder}.")
            waiting.append(target)


def _includes(path: Path, root: Path) -> list[str]:
    """What the task in ``path`` includes, by name, where it is harmless."""
    if not path.resolve().is_relative_to(root):
        raise DataError(f"{path} is a link to outside of the folder; put the file itself there.")
    try:
        text = read_small(path, _MOST_BYTES).decode("utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise too_deep()
            tag = getattr(event, "tag", None)
            if tag is not None and tag != "!":
                raise DataError(
                    f"{path} uses {tag}, which would run code; halfbyte runs none of a folder of "
                    "tasks."
                )
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        said = str(error).splitlines()[0]
        raise DataError(f"{path} cannot be read as YAML: {said}.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        return []
    if "class" in found:
        raise DataError(f"{path} names a class, which would run code; halfbyte runs none.")
    includes = found.get("include") or []
    return [str(one) for one in (includes if isinstance(includes, list) else [includes])]


def task_manager(folder: Path | None, names: Sequence[str] = ()) -> Any:
    """The harness's ``TaskManager`` with its own tasks and those of ``folder``.

    Its own are thousands of files, which are left out where ``folder`` has all ``names``.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None:
        require_harmless(folder)
        alone = TaskManager(include_path=str(folder), include_defaults=False)
        if names and set(names) <= set(alone.all_tasks):
            return alone
    return TaskManager(include_path=None if folder is None else str(folder))


def require_tasks(manager: Any, names: Sequence[str]) -> None:
    """Raises DataError for a name that is no task, group or tag."""
    import difflib

    known = manager.all_tasks
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else "see --lm-eval-path."
            raise DataError(f"lm-evaluation-harness has no task {name}; {hint}")


def fetched(manager: Any, names: Sequence[str]) -> list[Fetched]:
    """The data sets that the tasks would fetch, as far as their files say it, in their order."""
    found: dict[str, Fetched] = {}
    seen: set[str] = set()
    waiting: list[Any] = list(names)
    while waiting:
        name = waiting.pop(0)
        if isinstance(name, dict):
            name = name.get("task") or name.get("group")
        if isinstance(name, list):
            waiting += name
            continue
        if not isinstance(name, str) or name in seen:
            continue
        seen.add(name)
        entry = manager.task_index.get(name)
        if entry is None:
            continue
        config = entry.cfg or {}
        tasks = config.get("task")
        if entry.kind.name == "TAG":  # of which the entry has the tasks, as a task has its tags
            waiting += sorted(entry.tags)
        elif isinstance(tasks, list):
            waiting += tasks
        what = None if isinstance(tasks, list) else _what(config)
        if what is not None:
            found.setdefault(name, Fetched(name, what))
    return list(found.values())


def _what(config: dict[str, Any]) -> str | None:
    """The data set that a task's configuration names, None for files of this machine."""
    path = config.get("dataset_path")
    if not isinstance(path, str):
        return None
    if path not in _FILE_KINDS:
        if Path(path).exists():
            return None
        name = config.get("dataset_name")
        return f"{path} ({name})" if name else path
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    for file in _strings(files):
        if "://" in file:
            return file
    return None


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for inner in value.values() for text in _strings(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in _strings(inner)]
    return [value] if isinstance(value, str) else []


@contextmanager
def guarded(*, download: bool) -> Iterator[None]:
    """The harness at work: its templates in a sandbox, no program fetched as a metric.

    Without ``download`` nothing is asked of the network. Raises DataError where a task needs a
    metric that is a program of the hub's.
    """
    import datasets
    import huggingface_hub
    import lm_eval.evaluator
    import lm_eval.utils
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    sandbox = ImmutableSandboxedEnvironment(
        loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
    )
    sandbox.filters.update(lm_eval.utils.env.filters)
    programs: list[str] = []

    def refuse(name: str, *_: Any, **__: Any) -> Any:
        programs.append(name)
        raise DataError(_program(name))

    with ExitStack() as stack:
        stack.enter_context(_replaced(lm_eval.utils, "env", sandbox))
        # What it would add to its results by asking git, pip and others as programs.
        for name in ("add_env_info", "get_git_commit_hash"):
            stack.enter_context(_replaced(lm_eval.evaluator, name, lambda *_: None))
        if importlib.util.find_spec("evaluate") is not None:
            stack.enter_context(_replaced(importlib.import_module("evaluate"), "load", refuse))
        if not download:
            stack.enter_context(_replaced(datasets.config, "HF_HUB_OFFLINE", True))
            stack.enter_context(_replaced(datasets.config, "HF_DATASETS_OFFLINE", True))
            stack.enter_context(_replaced(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
        try:
            yield
        except Exception as error:
            # The harness catches what a metric's loading raises, and stumbles over it later.
            if programs and not isinstance(error, DataError):
                raise DataError(_program(programs[0])) from error
            raise
        if programs:
            raise DataError(_program(programs[0]))


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """With another value of what ``module`` has under ``name``, if it has that."""
    if not hasattr(module, name):
        yield
        return
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _program(name: str) -> str:
    return (
        f"a task measures by {name}, which is a program of the hub's evaluate library, and "
        "halfbyte fetches and runs none; choose another task."
    )
