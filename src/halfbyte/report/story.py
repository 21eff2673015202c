"""A run folder's records, put in order: all that a report knows of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from halfbyte.data.audit.private import hidden
from halfbyte.errors import RunError
from halfbyte.evaluate.results import Results, read_results
from halfbyte.evaluate.task_results import TaskResults, read_task_results
from halfbyte.events import Record, read_events
from halfbyte.events.log import FILE_NAME as EVENTS_FILE
from halfbyte.events.types import (
    Answered,
    Artifact,
    Audited,
    Changed,
    Checked,
    Checkpointed,
    Choice,
    Diverged,
    Energy,
    Environment,
    Evaluated,
    Event,
    Fallback,
    Finished,
    Found,
    Funnel,
    Heartbeat,
    Interrupted,
    Kept,
    ModelLoaded,
    Noticed,
    Phase,
    RateLowered,
    RolledBack,
    RunStarted,
    Step,
    StoppedEarly,
    Technique,
    TrainingStarted,
    Warned,
)
from halfbyte.recipe import Recipe
from halfbyte.recipe.load import load_recipe
from halfbyte.recipe.yaml_tree import read_tree
from halfbyte.report.done_steps import DoneSteps
from halfbyte.report.side_by_side import SideBySide, read_beside

E = TypeVar("E", bound=Event)

SBOM_FILE = "sbom.json"


@dataclass(frozen=True)
class Process:
    """One process that worked on the run: the first, or one that resumed it."""

    started: RunStarted
    begin: float  # unix seconds of its first event
    end: float  # and of its last
    energy: Energy | None
    device: str = ""
    last_step: int = 0  # that it did
    ended: str = ""  # how, in words


@dataclass(frozen=True)
class Answer:
    """A held-out prompt and what was answered to it."""

    row: int
    prompt: str
    reference: str
    before: str | None
    after: str | None
    source: int = 0


@dataclass(frozen=True)
class Story:
    """One run as its records tell it.

    What a resumed process did again counts as done last: the steps, evaluations and checkpoints
    after the checkpoint it went on from are those of the later process. So it is with what a
    process did again after it went back to a checkpoint by itself.
    """

    name: str  # the folder's own name
    recipe: Recipe  # effective
    asked: dict[str, Any]  # the recipe's own text, by dotted key
    processes: list[Process]
    environments: list[Environment]  # one for each different machine or set of versions
    choices: dict[str, Choice]  # by key
    warnings: list[Warned]
    findings: list[Found]  # of the audit; none in records of before there were any
    fallbacks: list[Fallback]
    phases: list[Phase]  # a name that comes twice is summed
    audit: Audited | None
    funnel: Funnel | None
    model: ModelLoaded | None
    techniques: dict[str, Technique]
    plan: TrainingStarted | None
    steps: list[Step]  # by step
    repeated_steps: int  # done again after a resume, or after the run went back
    base: Evaluated | None
    quantized_base: Evaluated | None
    evaluations: list[Evaluated]  # of the adapter, by step
    answers: list[Answer]
    checkpoints: list[Checkpointed]
    kept: Kept | None
    checks: list[Checked]
    artifacts: list[Artifact]
    interrupted: Interrupted | None
    diverged: Diverged | None
    finished: Finished | None
    noticed: list[Noticed] = field(default_factory=list)  # by step
    rolled_back: list[RolledBack] = field(default_factory=list)  # in the order of time
    rates_lowered: list[RateLowered] = field(default_factory=list)
    stopped_early: StoppedEarly | None = None
    changed: list[Changed] = field(default_factory=list)  # settings, since it was begun
    missing: list[str] = field(default_factory=list)  # files of the folder that were not there
    packages: list[tuple[str, str, str]] = field(default_factory=list)  # name, version, licence
    judged: Results | str | None = None  # of ``halfbyte evaluate``, or why they cannot be read
    tasks: TaskResults | str | None = None  # of its ``--lm-eval``
    side_by_side: SideBySide | str | None = None  # of ``halfbyte compare``, likewise

    @property
    def last_step(self) -> int:
        """The last optimizer step that was done; 0 where none was."""
        return self.steps[-1].step if self.steps else 0

    @property
    def planned_steps(self) -> int:
        return self.plan.steps if self.plan else self.last_step

    @property
    def adapter(self) -> Evaluated | None:
        """Held-out loss of the adapter that is kept or, in a run that has kept none, the last."""
        if self.kept is not None:
            return next((e for e in self.evaluations if e.step == self.kept.step), None)
        return self.evaluations[-1] if self.evaluations else None

    @property
    def adapter_loss(self) -> float | None:
        if self.adapter is not None:
            return self.adapter.loss
        return self.kept.held_out_loss if self.kept else None

    @property
    def title(self) -> str:
        if self.recipe.title:
            return self.recipe.title
        return f"{self.model_name}, fine-tuned with QLoRA"

    @property
    def model_name(self) -> str:
        """What to call the base model in a sentence: a path or a package without what is around."""
        name = self.model.name if self.model else self.recipe.model.name
        name = name.removeprefix("pypi:").split("==", 1)[0].replace("\\", "/")
        return name.rstrip("/").rsplit("/", 1)[-1]

    @property
    def begin(self) -> float | None:
        return self.processes[0].begin if self.processes else None

    @property
    def working_seconds(self) -> float:
        """Seconds that processes worked on the run, pauses between them left out."""
        return sum(p.end - p.begin for p in self.processes)

    @property
    def energies(self) -> list[Energy]:
        return [p.energy for p in self.processes if p.energy is not None]

    def is_of_another_adapter(self, sha256: object) -> bool:
        """Whether the run has gone on since the adapter with this checksum was judged."""
        path = "adapter/adapter_model.safetensors"
        weights = [a.sha256 for a in self.artifacts if a.path == path]
        return bool(weights) and sha256 is not None and weights[-1] != sha256

    def windowed_loss(self, step: int) -> float | None:
        """The logged loss at ``step``: the mean of the last ``logging_steps`` steps up to it.

        None where ``step`` was not reached.
        """
        if step > self.last_step:
            return None
        first = step - self.recipe.training.logging_steps + 1
        losses = [s.loss for s in self.steps if first <= s.step <= step and counts(s)]
        return sum(losses) / len(losses) if losses else None


def counts(step: Step) -> bool:
    """Whether the step's loss belongs in a mean: not where fp16 overflowed and nothing came of it.

    A loss that is not finite and did change the weights is to be seen.
    """
    return math.isfinite(step.loss) or not step.skipped


def read_story(folder: Path) -> Story:
    """Read ``folder``'s records.

    Raises RunError where it holds no run, and RecipeError where its recipe cannot be read.
    """
    if not (folder / EVENTS_FILE).is_file():
        what = "does not exist" if not folder.exists() else f"holds no run (no {EVENTS_FILE})"
        raise RunError(f"{folder} {what}; name the folder that halfbyte train printed.")
    records = [r for r in read_events(folder) if not isinstance(r.event, Heartbeat)]
    if not records:
        raise RunError(
            f"{folder / EVENTS_FILE} holds no event that can be read; "
            "name the folder of another run."
        )
    asked = folder / "recipe.asked.yaml"
    story = _tell(
        records,
        name=_own_name(records, folder),
        recipe=_read_recipe(folder / "recipe.yaml"),
        asked=flatten(_read_asked(asked)) if asked.exists() else {},
        missing=[] if asked.exists() else [asked.name],
    )
    return replace(
        story,
        packages=_packages(folder / SBOM_FILE),
        judged=read_results(folder),
        tasks=read_task_results(folder),
        side_by_side=read_beside(folder),
    )


def _packages(bill: Path) -> list[tuple[str, str, str]]:
    """The packages of a bill of materials; none where there is none that can be read."""
    try:
        components = json.loads(bill.read_text(encoding="utf-8"))["components"]
        return [
            (
                str(one["name"]),
                str(one.get("version", "")),
                ", ".join(
                    str(e.get("expression") or e["license"]["name"])
                    for e in one.get("licenses", [])
                )
                or "not stated",
            )
            for one in components
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A recipe's values by dotted key: ``{"lora": {"r": 8}}`` gives ``{"lora.r": 8}``."""
    if not isinstance(tree, dict):
        return {}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _tell(
    records: list[Record], *, name: str, recipe: Recipe, asked: dict[str, Any], missing: list[str]
) -> Story:
    groups = _by_process(records)
    events = [r.event for r in records]
    done = DoneSteps()
    for event in events:
        done.take(event)
    last = [r.event for r in groups[-1]]
    measured = {e.what: e for e in _only(events, Evaluated)}
    finished = _last(_only(events, Finished))
    return Story(
        name=name,
        recipe=recipe,
        asked=asked,
        processes=[_process(group) for group in groups],
        environments=_different(_only(events, Environment)),
        choices={e.key: e for e in _only(events, Choice)},
        warnings=_different(_only(events, Warned)),
        findings=_different(_only(events, Found)),
        fallbacks=_different(_only(events, Fallback)),
        phases=_summed(_only(events, Phase)),
        audit=_last(_only(events, Audited)),
        funnel=_last(_only(events, Funnel)),
        model=_last(_only(events, ModelLoaded)),
        techniques={e.name: e for e in _only(events, Technique)},
        plan=_last(_only(events, TrainingStarted)),
        steps=done.steps,
        repeated_steps=done.repeated,
        base=measured.get("base"),
        quantized_base=measured.get("quantized base"),
        evaluations=done.evaluations,
        answers=answers_of(_only(events, Answered)),
        checkpoints=done.checkpoints,
        kept=_last(_only(last, Kept)),
        checks=list({e.name: e for e in _only(last, Checked)}.values()),
        artifacts=sorted({e.path: e for e in _only(last, Artifact)}.values(), key=_place),
        interrupted=None if finished else _last(_only(last, Interrupted)),
        diverged=None if finished else _last(_only(last, Diverged)),
        finished=finished,
        noticed=done.noticed,
        rolled_back=done.rolled_back,
        rates_lowered=done.rates_lowered,
        changed=_only(events, Changed),
        stopped_early=_last(_only(last, StoppedEarly)),
        missing=missing,
    )


def _place(artifact: Artifact) -> tuple[bool, str]:
    return not artifact.path.startswith("adapter/"), artifact.path


def _by_process(records: list[Record]) -> list[list[Record]]:
    groups: list[list[Record]] = [[]]
    for record in records:
        if isinstance(record.event, RunStarted) and groups[-1]:
            groups.append([])
        groups[-1].append(record)
    return groups


def _process(group: list[Record]) -> Process:
    events = [r.event for r in group]
    started = next(iter(_only(events, RunStarted)), RunStarted("unknown", [], ""))
    environment = _last(_only(events, Environment))
    return Process(
        started,
        group[0].time,
        group[-1].time,
        _last(_only(events, Energy)),
        device="" if environment is None else environment.gpu or environment.cpu,
        last_step=max((e.step for e in _only(events, Step)), default=0),
        ended=_ended(events),
    )


def _ended(events: list[Event]) -> str:
    for event in reversed(events):
        match event:
            case Finished():
                return "finished"
            case Interrupted():
                return f"stopped by {event.signal} after step {event.step:,}"
            case Diverged():
                return f"diverged at step {event.step:,}"
            case _:
                pass
    return "without a word: killed, or its machine was lost"


def answers_of(events: list[Answered]) -> list[Answer]:
    """Each prompt with what was answered before and after, as they came, private data hidden."""
    rows = list(dict.fromkeys((e.source, e.row) for e in events))
    found = {(e.source, e.row, e.when): e for e in events}
    answers = []
    for source, row in rows:
        before, after = (found.get((source, row, when)) for when in ("before", "after"))
        either = after or before
        if either is not None:
            answers.append(
                Answer(
                    row,
                    hidden(either.prompt),
                    hidden(either.reference),
                    hidden(before.text) if before else None,
                    hidden(after.text) if after else None,
                    source,
                )
            )
    return answers


def _summed(phases: list[Phase]) -> list[Phase]:
    seconds: dict[str, float] = {}
    for phase in phases:
        seconds[phase.name] = seconds.get(phase.name, 0.0) + phase.seconds
    return [Phase(name, total) for name, total in seconds.items()]


def _only(events: Sequence[Event], kind: type[E]) -> list[E]:
    return [e for e in events if isinstance(e, kind)]


def _last(events: list[E]) -> E | None:
    return events[-1] if events else None


def _different(events: list[E]) -> list[E]:
    different: list[E] = []
    for event in events:
        if event not in different:
            different.append(event)
    return different


def _own_name(records: list[Record], folder: Path) -> str:
    started = _only([r.event for r in records], RunStarted)
    said = started[0].folder.rstrip("/").rsplit("/", 1)[-1] if started else ""
    return said or folder.resolve().name


def _read_recipe(path: Path) -> Recipe:
    if not path.exists():
        raise RunError(f"{path} is missing, and a report needs it; put the run's recipe back.")
    return load_recipe(path)


def _read_asked(path: Path) -> Any:
    # It is shown and no more, so a byte that is no text does not keep a report from being made.
    return read_tree(path.read_text(encoding="utf-8-sig", errors="replace"), str(path)).values
