"""What is measured: the cases, the tools of each, and the processes that this makes.

A measurement is one process of one tool. It is named ``case/tool/round``, and the name is what a
later command knows it by.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

WARMUP = 5  # optimizer steps before the timed ones, in every tool
HALFBYTE_STEPS = 120  # timed; one step is so short that more of them cost nothing
PROFILED_STEPS = 10  # of halfbyte, in a process of its own
RECIPE_STEPS = 375  # what the schedule of the rate is made for, though few of them are done
PEERS = ("trl", "trl-liger", "trl-liger-padded", "unsloth")


@dataclass(frozen=True)
class Case:
    """One line of work that every tool of it does.

    ``kind`` is ``steps`` (timed steps, then one profiled) or ``wall`` (the whole command).
    ``rows`` is a multiple of ``batch``, so that no step of an epoch is smaller. ``checkpointing``
    is the peers'. ``most_steps`` and ``most_rounds`` bound what the command line asks for.
    """

    name: str
    tools: tuple[str, ...]  # in the order of one round
    kind: str = "steps"
    rows: int = 500
    batch: int = 4
    dropout: float = 0.05
    checkpointing: bool = False
    tight: bool = False  # halfbyte gets no more memory than Unsloth took
    fp16: bool = False  # and what a T4 has
    cold: bool = False
    profiled: bool = False  # one more process of halfbyte, under the profiler
    most_steps: int | None = None
    most_rounds: int | None = None

    @property
    def rows_file(self) -> str:
        return f"rows-{self.rows}-by-{self.batch}.json"


CASES = {
    case.name: case
    for case in (
        Case("tinyllama-free", ("halfbyte", "unsloth", "trl"), profiled=True),
        Case(
            "tinyllama-tight",
            ("unsloth", "halfbyte", "trl"),
            checkpointing=True,
            tight=True,
            profiled=True,
        ),
        Case(
            "tinyllama-packed-16k",
            ("halfbyte", "trl-liger", "trl-liger-padded"),
            rows=440,
            batch=88,
            profiled=True,
            most_steps=20,
        ),
        Case("recipe-cold", ("halfbyte",), kind="wall", cold=True),
        Case("recipe-warm", ("halfbyte",), kind="wall"),
        Case("tinyllama-fp16", ("halfbyte",), fp16=True),
        Case(
            "tinyllama-free-nodropout",
            ("halfbyte", "unsloth", "trl"),
            dropout=0.0,
            most_rounds=1,
        ),
        Case(
            "tinyllama-tight-nodropout",
            ("unsloth", "halfbyte", "trl"),
            dropout=0.0,
            checkpointing=True,
            tight=True,
            most_rounds=1,
        ),
        Case(
            "tinyllama-2rows-nodropout",
            ("halfbyte", "unsloth", "trl"),
            batch=2,
            dropout=0.0,
            most_rounds=1,
        ),
    )
}
# Left out unless it is named.
BY_NAME_ONLY = {"tinyllama-2rows-nodropout"}


@dataclass(frozen=True)
class Measurement:
    """One process to run."""

    case: Case
    tool: str
    round: int
    steps: int  # timed
    profile: bool = False  # halfbyte under the profiler; a peer's process profiles itself

    @property
    def key(self) -> str:
        return f"{self.case.name}/{self.tool}/{'profile' if self.profile else self.round}"

    @property
    def timeout_s(self) -> float:
        """After so long something is wrong."""
        return 240.0 if self.tool in PEERS else 180.0

    @property
    def expected_s(self) -> float:
        """What it takes on an H100 machine, start and end included; measured times go first."""
        if self.case.kind == "wall":
            return 45.0 if self.case.cold else 25.0
        if self.tool == "unsloth":
            return 75.0
        if self.tool in PEERS:
            return 45.0 + (1.4 * (WARMUP + self.steps) if self.case.batch > 4 else 0.0)
        return 35.0 if self.case.batch > 4 else 25.0

    def spec(self, work: str) -> dict[str, Any]:
        """What the process is told, beside where things lie."""
        case = self.case
        return {
            "key": self.key,
            "tool": self.tool,
            "work": work,
            "rows_file": case.rows_file,
            "rows": case.rows,
            "batch": case.batch,
            "dropout": case.dropout,
            "checkpointing": case.checkpointing,
            "fp16": case.fp16,
            "tight": case.tight,
            "warmup": WARMUP,
            "steps": self.steps,
            "recipe_steps": RECIPE_STEPS,
            "profile": self.profile,
            "profiled_steps": PROFILED_STEPS,
        }


def measurements(names: Iterable[str], rounds: int, steps: int) -> Iterator[Measurement]:
    """Case by case, the tools alternating by round; ``steps`` are the peers' timed ones.

    ``recipe-warm`` uses the caches that ``recipe-cold`` has filled, so that of these two a round
    of the one follows a round of the other.
    """
    chosen = [CASES[name] for name in names]
    walls = [case for case in chosen if case.kind == "wall"]
    done = False
    for case in chosen:
        if case.kind == "wall":
            if not done:
                for number in range(1, rounds + 1):
                    yield from (Measurement(wall, "halfbyte", number, 0) for wall in walls)
            done = True
            continue
        peer_steps = min(steps, case.most_steps or steps)
        for number in range(1, min(rounds, case.most_rounds or rounds) + 1):
            for tool in case.tools:
                count = peer_steps if tool in PEERS else HALFBYTE_STEPS
                yield Measurement(case, tool, number, count)
        if case.profiled:
            yield Measurement(case, "halfbyte", 0, WARMUP, profile=True)
