"""A blind trial: which of two answers is better, chosen by somebody who does not know whose it is.

Which answer stands on the left is drawn by a seed. Every choice is kept at once, in a file that is
only ever added to, so that a trial can be left and gone on with at any time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from halfbyte.errors import RunError
from halfbyte.foreign_json import parse_json, read_small
from halfbyte.report.side_by_side import Asked, Column, SideBySide

FILE = "blind.jsonl"
LEFT, RIGHT, TIE, SKIPPED = "left", "right", "tie", "skipped"


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; ``left`` and ``right`` are names of models, as drawn."""

    key: str
    title: str
    question: str
    left: str
    right: str
    left_identity: str
    right_identity: str
    left_text: str
    right_text: str


@dataclass(frozen=True)
class Choice:
    """What was chosen of a pair: LEFT, RIGHT, TIE or SKIPPED."""

    pair: str  # its key
    left: str
    right: str
    left_identity: str
    right_identity: str
    chosen: str
    question: str
    left_text: str
    right_text: str
    seed: int  # that drew the sides
    time: float  # unix seconds


def pair_key(question: str, one: Column, other: Column, max_new_tokens: int) -> str:
    """The same for the same question to the same weights, whichever stands first."""
    models = sorted([one.identity, other.identity])
    said = json.dumps([question, *models, max_new_tokens])
    return hashlib.sha256(said.encode()).hexdigest()[:24]


def pairs_of(seen: SideBySide, seed: int) -> tuple[list[Pair], int]:
    """Every two answers to each prompt, in an order and with sides that the seed draws.

    The order tells nothing of which model is which. Second: how many pairs are left out because
    both answers are the same.
    """
    found: dict[str, Pair] = {}  # a question that stands in two rows is asked once
    same = 0
    for asked in seen.asked:
        for one, other in combinations(range(len(seen.columns)), 2):
            if asked.answers[one].text.strip() == asked.answers[other].text.strip():
                same += 1
            else:
                pair = _drawn(seen, asked, one, other, seed)
                found.setdefault(pair.key, pair)
    return sorted(found.values(), key=lambda pair: _draw(seed, f"order {pair.key}")), same


def _drawn(seen: SideBySide, asked: Asked, one: int, other: int, seed: int) -> Pair:
    columns, limit = seen.columns, seen.max_new_tokens
    key = pair_key(asked.question, columns[one], columns[other], limit)
    if columns[one].identity > columns[other].identity:  # what is drawn is whose, not which column
        one, other = other, one
    if _draw(seed, f"side {key}") < 0.5:
        one, other = other, one
    return Pair(
        key=key,
        title=asked.title,
        question=asked.question,
        left=columns[one].name,
        right=columns[other].name,
        left_identity=columns[one].identity,
        right_identity=columns[other].identity,
        left_text=asked.answers[one].text,
        right_text=asked.answers[other].text,
    )


def _draw(seed: int, what: str) -> float:
    """A number from 0 to 1 that follows from the two, whatever else is drawn."""
    return random.Random(f"{seed} {what}").random()


class Tally:
    """The choices in a file, and a place for more."""

    def __init__(self, path: Path) -> None:
        """Reads what ``path`` holds already; it need not exist.

        Raises RunError where it cannot be read. Lines that are no choices (the last may have been
        cut off by a machine's end) are counted in ``unreadable`` and left as they are.
        """
        self.path = path
        self.choices: list[Choice] = []
        self.unreadable = 0
        self._open_line = False  # the file does not end with a line's end
        if path.is_symlink():
            raise RunError(f"{path} is a link, and a trial would write where it leads; remove it.")
        try:
            text = read_small(path).decode("utf-8", errors="replace") if path.exists() else ""
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read ({error}); move it away.") from error
        self._open_line = bool(text) and not text.endswith("\n")
        adapter = TypeAdapter(Choice)
        for line in text.split("\n"):
            if not line.strip():
                continue
            try:
                self.choices.append(adapter.validate_python(parse_json(line)))
            except (ValueError, ValidationError):
                self.unreadable += 1

    def asked(self) -> set[str]:
        """Keys of the pairs that were shown, skipped ones included."""
        return {choice.pair for choice in self.choices}

    def add(self, choice: Choice) -> None:
        """Keep ``choice`` on the disk, at once. Raises RunError where that cannot be done."""
        line = json.dumps(asdict(choice), ensure_ascii=True) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" + line if self._open_line else line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written ({error.strerror}); free some space or mend its "
                "permissions, and the trial goes on with this pair."
            ) from error
        self._open_line = False
        self.choices.append(choice)


@dataclass(frozen=True)
class Score:
    """What was chosen between two models, by name; ``wins`` and ``losses`` are those of ``one``."""

    one: str
    other: str
    wins: int
    losses: int
    ties: int
    skipped: int

    @property
    def p(self) -> float:
        """Of the two-sided sign test; ties and skipped pairs say nothing to it."""
        return sign_test(self.wins, self.losses)


def scores(choices: Iterable[Choice], columns: Sequence[Column]) -> list[Score]:
    """A score for each two of ``columns`` that were compared; choices of other models count not.

    The later column is ``one``: an adapter stands behind its base.
    """
    found = []
    listed = list(choices)
    for other, one in combinations(columns, 2):
        both = {one.identity, other.identity}
        chosen = [_whose(c) for c in listed if {c.left_identity, c.right_identity} == both]
        if chosen:
            found.append(
                Score(
                    one.name,
                    other.name,
                    wins=chosen.count(one.identity),
                    losses=chosen.count(other.identity),
                    ties=chosen.count(TIE),
                    skipped=chosen.count(SKIPPED),
                )
            )
    return found


def _whose(choice: Choice) -> str:
    """The identity of the chosen model, TIE or SKIPPED."""
    if choice.chosen == LEFT:
        return choice.left_identity
    return choice.right_identity if choice.chosen == RIGHT else choice.chosen


def sign_test(wins: int, losses: int) -> float:
    """How likely at least so uneven a result is, in either direction, where both are as good.

    The two-sided exact sign test (Arbuthnott, 1710; Conover, Practical Nonparametric Statistics,
    section 3.4): twice the binomial tail P(X <= min(wins, losses)) at one half, at most 1.
    """
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)
