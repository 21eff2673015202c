"""The conversation in a terminal: lines in, commands, an answer as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console

from halfbyte.cli.chat_answer import ChatSettings, answer_message, cut_text, make_conversation
from halfbyte.cli.chat_commands import Talk, Then, obey
from halfbyte.cli.units import rate_text, visible
from halfbyte.cli.word_wrap import WordWrap
from halfbyte.errors import HalfbyteError
from halfbyte.finished.variants import BASE, FINAL, use_variant
from halfbyte.generate.answer import Answer
from halfbyte.model.source import context_length

if TYPE_CHECKING:
    from halfbyte.finished.opened import OpenedAdapter

QUOTES = '"""'


class Session:
    """Reads messages and answers them until the user leaves.

    ``read`` asks for a line, as ``input`` does: it raises EOFError at the end of the input and
    KeyboardInterrupt on Ctrl-C.
    """

    def __init__(
        self,
        opened: OpenedAdapter,
        settings: ChatSettings,
        console: Console,
        *,
        system: str | None = None,
        read: Callable[[str], str] | None = None,
    ) -> None:
        self.talk = Talk(opened, make_conversation(opened, settings, system), settings, console)
        self._console = console
        self._read = read or _line_reader()
        self._asked: object = None  # all that the last answer followed from, but for the seed
        self._stopped = False  # the last thing that happened was Ctrl-C

    def run(self) -> None:
        """Until Ctrl-D, /quit, or Ctrl-C twice in a row."""
        self._greet()
        while True:
            try:
                message, is_command = self._ask()
                self._stopped = False
                if not message.strip():
                    continue
                then = obey(self.talk, message) if is_command else None
                if then is Then.LEAVE:
                    return
                if then is Then.ANSWER_AGAIN:
                    self._answer_again()
                elif then is None:
                    self._answer(message)
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:
                self._console.print()
                if self._stopped:
                    return
                self._stopped = True
                self.talk.note("Ctrl-C once more, or Ctrl-D, leaves")

    def _greet(self) -> None:
        opened, settings = self.talk.opened, self.talk.settings
        name = opened.source.name
        context = context_length(opened.model.config)
        facts = [
            f"{name} with its adapter",
            f"on {opened.qlora.device.type}",
            *([f"{context:,} tokens of context"] if context < 1 << 20 else []),
            settings.words,
        ]
        self._console.print(visible(str(opened.folder)), style="bold")
        self.talk.note(", ".join(facts))
        if self.talk.conversation.single_turn:
            self.talk.note(
                "it was trained on single questions: each message is a conversation of its own"
            )
        self.talk.note("/help lists the commands, Ctrl-D leaves")
        self._console.print()

    def _ask(self) -> tuple[str, bool]:
        """A message (one line, or several) and whether it is a command."""
        line = self._read(self._prompt("you:"))
        if line.strip().startswith(QUOTES):
            return self._quoted(line.strip()[len(QUOTES) :]), False
        if line.startswith("/") and "\n" not in line:  # a paste can bring line breaks
            return line, True
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._read(self._prompt("...")))
        return "\n".join(lines), False

    def _quoted(self, first: str) -> str:
        lines: list[str] = []
        line = first
        while not line.rstrip().endswith(QUOTES):
            lines.append(line)
            line = self._read(self._prompt("..."))
        lines.append(line.rstrip()[: -len(QUOTES)])
        # The quotes most often stand in lines of their own.
        return "\n".join(lines).strip("\n")

    def _answer_again(self) -> None:
        """Answer the last message once more, in place of the answer that it has."""
        talk, message = self.talk, self.talk.last
        assert message is not None
        said = talk.conversation.said
        before = talk.conversation.take_last() if said and said[-1].said == message else None
        asked = self._asked
        if not self._answer(message):
            if before is not None:
                talk.conversation.add(before.said, before.answered, before.by)
        elif asked == self._asked and talk.settings.temperature == 0 and not self._stopped:
            talk.note("greedy answers are the same each time; /temperature 0.7 draws them anew")
            self._console.print()

    def _answer(self, message: str) -> bool:
        """Answer ``message`` and remember the turn, also one that the user stopped.

        False where there is no answer, which the user is told.
        """
        talk = self.talk
        talk.last = message
        try:
            rendered = talk.conversation.prompt(message)
        except HalfbyteError as error:
            talk.note(str(error))
            return False
        if rendered.dropped:
            turns = "turn was" if rendered.dropped == 1 else f"{rendered.dropped} turns were"
            talk.note(f"longer than the model takes: the oldest {turns} dropped")
        heard: list[str] = []
        name = "model" if talk.variant == FINAL else talk.variant
        write = self._console.file.write
        wrap = (
            WordWrap(write, self._console.width, len(name) + 2)
            if self._console.is_terminal
            else None
        )

        def show(piece: str) -> None:
            heard.append(piece)
            if wrap is None:
                write(visible(piece))
            else:
                wrap.push(visible(piece))
            self._console.file.flush()

        self._console.print(f"{name}: ", style=self._answer_style(), end="")
        self._asked = (rendered.prompt, talk.variant, replace(talk.settings, seed=0))
        settings = replace(talk.settings, seed=talk.settings.seed + talk.answers)
        began = time.perf_counter()
        given: Answer | None = None
        try:
            with use_variant(talk.opened, talk.variant):
                given = answer_message(talk.opened, rendered.prompt, settings, show)
        except KeyboardInterrupt:
            self._stopped = True
        except HalfbyteError as error:
            self._console.print()
            talk.note(str(error))
            return False
        talk.answers += 1
        if wrap is not None:
            wrap.end()
        self._console.print()
        talk.conversation.add(message, "".join(heard), talk.variant)
        self._note_answer(given, time.perf_counter() - began)
        return True

    def _note_answer(self, given: Answer | None, seconds: float) -> None:
        if given is None:
            self.talk.note("stopped; Ctrl-C once more, or Ctrl-D, leaves")
        else:
            if given.prompt_cut:
                self.talk.note(cut_text(given.prompt_cut))
            count = "1 token" if given.tokens == 1 else f"{given.tokens:,} tokens"
            if not given.text and given.ended:
                count += ", which ended the answer before it began"
            limit = "" if given.ended else ", the longest allowed (--max-new-tokens)"
            self.talk.note(f"{count}{limit}, {rate_text(given.tokens / max(seconds, 1e-9))}")
        self._console.print()

    def _answer_style(self) -> str:
        return "bold yellow" if self.talk.variant == BASE else "bold green"

    def _prompt(self, text: str) -> str:
        """A prompt for readline, which must be told which characters take no room."""
        if self._console.no_color or not self._console.is_terminal:
            return f"{text} "
        return f"\001\033[1;36m\002{text}\001\033[0m\002 "


def _line_reader() -> Callable[[str], str]:
    """``input`` with line editing and a history, where Python has them."""
    try:
        import readline  # from now on ``input`` uses it
    except ImportError:
        return input
    if "libedit" not in (readline.__doc__ or ""):
        # Python turns this off; with it a paste of several lines is one message.
        readline.parse_and_bind("set enable-bracketed-paste on")
    return input
