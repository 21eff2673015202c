"""A blind trial in a terminal: two answers without names, and a key for the better one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from halfbyte.cli.compare_terminal import doing
from halfbyte.cli.display import make_console
from halfbyte.cli.errors import STOPPED
from halfbyte.cli.units import visible
from halfbyte.errors import HalfbyteError
from halfbyte.finished.blind import (
    FILE,
    LEFT,
    RIGHT,
    SKIPPED,
    TIE,
    Choice,
    Pair,
    Score,
    Tally,
    pair_key,
    pairs_of,
    scores,
)

if TYPE_CHECKING:
    from halfbyte.finished.comparing import Place, Question, Wanted
    from halfbyte.report.side_by_side import Column

KEYS = {"l": LEFT, "r": RIGHT, "t": TIE, "s": SKIPPED}
KEYS |= {"left": LEFT, "right": RIGHT, "tie": TIE, "skip": SKIPPED}
ASKED = "better: l(eft), r(ight), t(ie), s(kip), q(uit)? "
# Below this answers stand one below the other.
ABREAST_FROM = 72
# How likely chance may be for a difference to be called one.
SIGNIFICANT = 0.05


def blind_trial(wanted: Wanted, places: Sequence[Place], folder: Path) -> None:
    """Answer the prompts that were not judged yet, and let the user judge them.

    Choices are kept in ``folder``. Raises HalfbyteError where fewer than two models are compared,
    typer.Exit(130) where the user stops it.
    """
    from halfbyte.finished.comparing import compare

    columns = [column for place in places for column in place.columns]
    if len({column.identity for column in columns}) < 2:
        raise HalfbyteError(
            "a blind trial needs two models that differ; name two --variants, or two folders."
        )
    tally = Tally(folder / FILE)
    console = make_console()
    if tally.unreadable:
        lines = "1 line" if tally.unreadable == 1 else f"{tally.unreadable} lines"
        where = visible(str(tally.path))
        console.print(f"{lines} of {where} cannot be read and do not count.", style="yellow")
    earlier = tally.asked()

    def judged(question: Question) -> bool:
        return _keys(question.shown, columns, wanted.max_new_tokens) <= earlier

    with doing(console) as (on_phase, on_fallback):
        seen = compare(wanted, places, skip=judged, on_phase=on_phase, on_fallback=on_fallback)
    pairs, same = pairs_of(seen, wanted.seed)
    open_pairs = [pair for pair in pairs if pair.key not in earlier]
    if same:
        answers = "1 pair has" if same == 1 else f"{same} pairs have"
        console.print(f"{answers} the same answer twice and nothing to choose.", style="dim")
    whole = judge(open_pairs, tally, console, seed=wanted.seed)
    for line in summary(scores(tally.choices, columns)):
        console.print(line)
    if tally.choices:
        where = visible(str(tally.path))
        console.print(f"{where} holds every choice; the same command goes on.", style="dim")
    if not whole:
        raise typer.Exit(STOPPED)


def _keys(question: str, columns: Sequence[Column], max_new_tokens: int) -> set[str]:
    return {
        pair_key(question, one, other, max_new_tokens)
        for place, one in enumerate(columns)
        for other in columns[place + 1 :]
    }


def judge(
    pairs: Sequence[Pair],
    tally: Tally,
    console: Console,
    *,
    seed: int,
    read: Callable[[str], str] = input,
) -> bool:
    """Show each pair and keep what is chosen; false where Ctrl-C ended it.

    ``read`` asks for a line, as ``input`` does. The end of the input leaves, as q does.
    """
    if not pairs:
        console.print("Every pair has been judged.")
        console.print()
        return True
    try:
        for number, pair in enumerate(pairs, 1):
            _show(console, pair, f"{number} of {len(pairs)}")
            chosen = _ask(console, read)
            if chosen is None:
                return True
            tally.add(
                Choice(
                    pair=pair.key,
                    left=pair.left,
                    right=pair.right,
                    left_identity=pair.left_identity,
                    right_identity=pair.right_identity,
                    chosen=chosen,
                    question=pair.question,
                    left_text=pair.left_text,
                    right_text=pair.right_text,
                    seed=seed,
                    time=time.time(),
                )
            )
    except KeyboardInterrupt:
        console.print()
        return False
    return True


def _ask(console: Console, read: Callable[[str], str]) -> str | None:
    """LEFT, RIGHT, TIE or SKIPPED; None to leave."""
    while True:
        try:
            key = read(ASKED).strip().lower()
        except EOFError:
            console.print()
            return None
        if key in ("q", "quit"):
            console.print()
            return None
        if key in KEYS:
            console.print()
            return KEYS[key]
        console.print("l, r, t, s or q", style="yellow")


def _show(console: Console, pair: Pair, where: str) -> None:
    console.print(Text.assemble((where, "bold cyan"), (f"  {visible(pair.title)}", "dim")))
    console.print(Padding(_text(pair.question), (0, 0, 1, 2)))
    if console.is_terminal and console.width >= ABREAST_FROM:
        table = Table.grid(expand=True, padding=(0, 2, 0, 0))
        table.add_column(ratio=1, overflow="fold")
        table.add_column(ratio=1, overflow="fold")
        table.add_row(Text("left", "bold"), Text("right", "bold"))
        table.add_row(_text(pair.left_text), _text(pair.right_text))
        console.print(table)
    else:
        for name, text in (("left", pair.left_text), ("right", pair.right_text)):
            console.print(Text(name, "bold"))
            console.print(Padding(_text(text), (0, 0, 0, 2)))
    console.print()


def _text(text: str) -> Text:
    return Text(visible(text.strip()).expandtabs(4) or "(nothing)")


def summary(found: Sequence[Score]) -> list[str]:
    """What was chosen, in sentences."""
    if not found:
        return ["Nothing has been chosen."]
    lines = []
    for score in found:
        decided = score.wins + score.losses
        beside = [
            f"{n} {what}" for n, what in ((score.ties, "tied"), (score.skipped, "skipped")) if n
        ]
        also = f" ({', '.join(beside)})" if beside else ""
        lines.append(
            f"{visible(score.one)} was better {_times(score.wins)}, {visible(score.other)} "
            f"{_times(score.losses)}{also}."
        )
        lines.append(f"  {_in_words(score, decided)}")
    return lines


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _in_words(score: Score, decided: int) -> str:
    if not decided:
        return "No pair was decided, so there is nothing to test."
    figure = "p < 0.001" if score.p < 0.001 else f"p = {score.p:.3f}"
    test = f"two-sided sign test over {decided} decided, {figure}"
    if score.p < SIGNIFICANT:
        better = score.one if score.wins > score.losses else score.other
        return f"{visible(better)} is better, beyond what chance explains ({test})."
    return f"That may be chance ({test})."
