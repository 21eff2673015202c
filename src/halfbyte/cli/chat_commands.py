"""What a line with a slash does in a chat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from halfbyte.cli.chat_answer import ChatSettings
from halfbyte.cli.chat_files import JSONL, Loaded, load_conversation, save_conversation
from halfbyte.cli.units import visible
from halfbyte.errors import HalfbyteError
from halfbyte.finished.variants import BASE, FINAL, variant_names
from halfbyte.generate.conversation import Conversation

if TYPE_CHECKING:
    from halfbyte.finished.opened import OpenedAdapter

HELP = """\
/system TEXT      set the system message; alone: take it away
/clear            forget the conversation so far
/undo             forget the last message and its answer
/again            answer the last message once more
/base             switch the adapter off, and on again, to compare with the base model
/use NAME         base, adapter, or step-N of a checkpoint; alone: list them
/temperature X    0 takes the likeliest token always, 0.7 is livelier
/seed N           of what is drawn; alone: say it
/save [FILE]      keep the conversation: .md to read, .jsonl to train on
/load FILE        go on with a conversation that was saved as .jsonl
/quit             leave, as Ctrl-D does, or Ctrl-C twice

A line that ends with \\ goes on in the next one.
Lines between \"\"\" and \"\"\" are one message, and so is what is pasted at once.
Ctrl-C stops an answer.
"""


@dataclass
class Talk:
    """What a chat is at: all that commands read and change."""

    opened: OpenedAdapter
    conversation: Conversation
    settings: ChatSettings
    console: Console
    variant: str = FINAL  # that answers
    compared: str = FINAL  # that /base goes back to
    answers: int = 0  # so far since the seed was set, so that each draws anew
    last: str | None = None  # message

    def note(self, text: str) -> None:
        """Something that no model said."""
        self.console.print(visible(text), style="dim")


class Then(Enum):
    """What comes after a command."""

    ASK = auto()
    ANSWER_AGAIN = auto()
    LEAVE = auto()


def obey(talk: Talk, line: str) -> Then:
    """Do what ``line``, which begins with a slash, says."""
    name, _, rest = line[1:].strip().partition(" ")
    command = _COMMANDS.get(name)
    if command is None:
        talk.note(f"there is no command /{name}; /help lists them")
        return Then.ASK
    return command(talk, rest.strip()) or Then.ASK


def _help(talk: Talk, _: str) -> None:
    talk.console.print(HELP)


def _leave(_: Talk, __: str) -> Then:
    return Then.LEAVE


def _system(talk: Talk, text: str) -> None:
    if text and not talk.conversation.takes_system():
        talk.note("the format that was trained has no place for a system message")
        return
    talk.conversation.system = text or None
    talk.note("the system message is set" if text else "no system message")


def _clear(talk: Talk, _: str) -> None:
    talk.conversation.clear()
    talk.note("the conversation begins anew")


def _undo(talk: Talk, _: str) -> None:
    turn = talk.conversation.take_last()
    if turn is None:
        talk.note("there is nothing to undo")
        return
    said = talk.conversation.said
    talk.last = said[-1].said if said else None
    talk.note(f"forgotten: {_first_words(turn.said)}")


def _again(talk: Talk, _: str) -> Then | None:
    if talk.last is None:
        talk.note("there is no message yet")
        return None
    return Then.ANSWER_AGAIN


def _base(talk: Talk, _: str) -> None:
    if talk.variant != BASE:
        talk.compared = talk.variant
        talk.variant = BASE
        talk.note("the adapter is off: the base model answers, in this format")
    else:
        talk.variant = talk.compared
        which = "" if talk.variant == FINAL else f", as it was at {talk.variant}"
        talk.note(f"the adapter is on again{which}")


def _use(talk: Talk, name: str) -> None:
    names = variant_names(talk.opened.found)
    if not name:
        talk.note(f"{talk.variant} answers; there are {', '.join(names)}")
    elif name not in names:
        talk.note(f"there is no {name}; there are {', '.join(names)}")
    else:
        talk.variant = name
        talk.compared = name if name != BASE else talk.compared
        talk.note(f"{name} answers from now on")


def _temperature(talk: Talk, text: str) -> None:
    try:
        value = float(text)
        if not 0 <= value < float("inf"):
            raise ValueError
    except ValueError:
        talk.note("/temperature wants a number, 0 or more")
        return
    talk.settings = replace(talk.settings, temperature=value)
    talk.note("greedy: always the likeliest" if value == 0 else f"temperature {value:g}")


def _seed(talk: Talk, text: str) -> None:
    if not text:
        drawn = f", and {talk.answers} answers since" if talk.answers else ""
        talk.note(f"the seed is {talk.settings.seed}{drawn}")
        return
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        talk.note("/seed wants a whole number, 0 or more")
        return
    talk.settings = replace(talk.settings, seed=int(text))
    talk.answers = 0
    greedy = "; it draws where the temperature is over 0" if not talk.settings.temperature else ""
    talk.note(f"the next answers draw from seed {int(text)}{greedy}")


def _save(talk: Talk, text: str) -> None:
    asked = _path(text or f"conversation{JSONL}")
    try:
        written = save_conversation(asked, talk.conversation, talk.opened.source.name)
    except HalfbyteError as error:
        talk.note(str(error))
        return
    taken = "" if written == asked else f" ({asked.name} is there already)"
    talk.note(f"saved: {written}{taken}")


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # of a user who has no home here
        return Path(text)


def _load(talk: Talk, text: str) -> None:
    if not text:
        talk.note("/load wants the name of a .jsonl file")
        return
    try:
        found = load_conversation(_path(text), all_rows=talk.conversation.single_turn)
    except HalfbyteError as error:
        talk.note(str(error))
        return
    _put(talk, found)


def _put(talk: Talk, found: Loaded) -> None:
    conversation = talk.conversation
    before = len(conversation.said)
    conversation.clear()
    if found.system is not None and not conversation.takes_system():
        talk.note("its system message is left out: the format that was trained has no place for it")
        conversation.system = None
    else:
        conversation.system = found.system
    for turn in found.turns:
        conversation.add(turn.said, turn.answered)
    talk.last = found.open_message or (found.turns[-1].said if found.turns else None)
    words = _turns(len(found.turns))
    if found.of > 1:
        words += f", the last of {found.of} conversations in the file"
    if before:
        words += f", in place of the {_turns(before)} so far"
    talk.note(f"loaded: {words}")
    if found.open_message is not None:
        talk.note(f"/again answers its last message: {_first_words(found.open_message)}")


def _turns(count: int) -> str:
    return "1 turn" if count == 1 else f"{count} turns"


def _first_words(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


_COMMANDS: dict[str, Callable[[Talk, str], Then | None]] = {
    **dict.fromkeys(("help", "?", "h"), _help),
    **dict.fromkeys(("quit", "exit", "q"), _leave),
    "system": _system,
    "clear": _clear,
    "undo": _undo,
    "again": _again,
    "base": _base,
    "use": _use,
    "temperature": _temperature,
    "seed": _seed,
    "save": _save,
    "load": _load,
}
