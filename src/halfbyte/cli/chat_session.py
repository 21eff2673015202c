"""The conversation in a terminal: lines in, commands, an answer as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich.console import Console

from halfbyte.cli.units import rate_text, visible
from halfbyte.cli.word_wrap import WordWrap
from halfbyte.errors import HalfbyteError, ModelError
from halfbyte.finished.found import require_template
from halfbyte.generate.answer import Answer, answer, room_for_prompt
from halfbyte.generate.conversation import Conversation
from halfbyte.generate.prompt import prompt_ids
from halfbyte.model.source import context_length

if TYPE_CHECKING:
    from halfbyte.finished.opened import OpenedAdapter

HELP = """\
/system TEXT      set the system message; alone: take it away
/clear            forget the conversation so far
/base             switch the adapter off, and on again, to compare with the base model
/again            answer the last message once more
/temperature X    0 takes the likeliest token always, 0.7 is livelier
/quit             leave, as Ctrl-D does, or Ctrl-C twice

A line that ends with \\ goes on in the next one.
Lines between \"\"\" and \"\"\" are one message, and so is what is pasted at once.
Ctrl-C stops an answer.
"""

QUOTES = '"""'


@dataclass(frozen=True)
class ChatSettings:
    """How answers are made."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0


def make_conversation(
    opened: OpenedAdapter, settings: ChatSettings, system: str | None
) -> Conversation:
    """An empty conversation in the format of the run.

    Only a model's own chat template takes several turns; in an instruction format each row was
    one question, so each message is. Raises ModelError for a system message that the format has
    no place for.
    """
    tokenizer = opened.tokenizer
    require_template(opened.found, tokenizer)
    conversation = Conversation(
        tokenizer,
        room=room_for_prompt(context_length(opened.model.config), settings.max_new_tokens),
        count=lambda prompt: len(prompt_ids(tokenizer, prompt)),
        system=system,
        single_turn=opened.single_turn,
    )
    if system is not None and not conversation.takes_system():
        raise ModelError(
            "the format that was trained has no place for a system message; leave out --system."
        )
    return conversation


def answer_message(
    opened: OpenedAdapter, prompt: str, settings: ChatSettings, on_text: Callable[[str], None]
) -> Answer:
    """The answer to one rendered prompt; ``on_text`` hears it as it comes."""
    (given,) = answer(
        opened.model,
        opened.tokenizer,
        [prompt],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        repetition_penalty=settings.repetition_penalty,
        seed=settings.seed,
        on_text=lambda _, piece: on_text(piece),
    )
    return given


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
        self._opened = opened
        self._settings = settings
        self._console = console
        self._read = read or _line_reader()
        self._conversation = make_conversation(opened, settings, system)
        self._adapter = True
        self._answers = 0  # so far, so that each draws anew
        self._last: str | None = None  # message
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
                if is_command:
                    if not self._command(message):
                        return
                else:
                    self._answer(message)
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:
                self._console.print()
                if self._stopped:
                    return
                self._stopped = True
                self._note("Ctrl-C once more, or Ctrl-D, leaves")

    def _greet(self) -> None:
        name = self._opened.source.name
        context = context_length(self._opened.model.config)
        temperature = self._settings.temperature
        facts = [
            f"{name} with its adapter",
            f"on {self._opened.qlora.device.type}",
            *([f"{context:,} tokens of context"] if context < 1 << 20 else []),
            "greedy" if temperature == 0 else f"temperature {temperature:g}",
        ]
        self._console.print(f"{self._opened.folder}", style="bold")
        self._note(", ".join(facts))
        if self._conversation.single_turn:
            self._note(
                "it was trained on single questions: each message is a conversation of its own"
            )
        self._note("/help lists the commands, Ctrl-D leaves")
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

    def _command(self, line: str) -> bool:
        """Obey a command; false to leave."""
        name, _, rest = line[1:].strip().partition(" ")
        rest = rest.strip()
        if name in ("quit", "exit", "q"):
            return False
        if name in ("help", "?", "h"):
            self._console.print(HELP)
        elif name == "system":
            self._set_system(rest or None)
        elif name == "clear":
            self._conversation.clear()
            self._note("the conversation begins anew")
        elif name == "base":
            self._adapter = not self._adapter
            state = "on again" if self._adapter else "off: the base model answers, in this format"
            self._note(f"the adapter is {state}")
        elif name == "again":
            if self._last is None:
                self._note("there is no message yet")
            else:
                self._conversation.forget_last(self._last)
                self._answer(self._last)
        elif name == "temperature":
            self._set_temperature(rest)
        else:
            self._note(f"there is no command /{visible(name)}; /help lists them")
        return True

    def _set_system(self, text: str | None) -> None:
        if text is not None and not self._conversation.takes_system():
            self._note("the format that was trained has no place for a system message")
            return
        self._conversation.system = text
        self._note("no system message" if text is None else "the system message is set")

    def _set_temperature(self, text: str) -> None:
        try:
            value = float(text)
            if not 0 <= value < float("inf"):
                raise ValueError
        except ValueError:
            self._note("/temperature wants a number, 0 or more")
            return
        self._settings = replace(self._settings, temperature=value)
        self._note("greedy: always the likeliest" if value == 0 else f"temperature {value:g}")

    def _answer(self, message: str) -> None:
        """Answer ``message`` and remember the turn, also one that the user stopped."""
        self._last = message
        try:
            rendered = self._conversation.prompt(message)
        except HalfbyteError as error:
            self._note(str(error))
            return
        if rendered.dropped:
            turns = "turn was" if rendered.dropped == 1 else f"{rendered.dropped} turns were"
            self._note(f"longer than the model takes: the oldest {turns} dropped")
        heard: list[str] = []
        name = "model: " if self._adapter else "base: "
        write = self._console.file.write
        wrap = (
            WordWrap(write, self._console.width, len(name)) if self._console.is_terminal else None
        )

        def show(piece: str) -> None:
            heard.append(piece)
            if wrap is None:
                write(visible(piece))
            else:
                wrap.push(visible(piece))
            self._console.file.flush()

        self._console.print(name, style=self._answer_style(), end="")
        settings = replace(self._settings, seed=self._settings.seed + self._answers)
        began = time.perf_counter()
        given: Answer | None = None
        try:
            with self._opened.qlora.adapter_on(self._adapter):
                given = answer_message(self._opened, rendered.prompt, settings, show)
        except KeyboardInterrupt:
            self._stopped = True
        except HalfbyteError as error:
            self._console.print()
            self._note(str(error))
            return
        self._answers += 1
        if wrap is not None:
            wrap.end()
        self._console.print()
        self._conversation.add(message, "".join(heard))
        self._note_answer(given, time.perf_counter() - began)

    def _note_answer(self, given: Answer | None, seconds: float) -> None:
        if given is None:
            self._note("stopped; Ctrl-C once more, or Ctrl-D, leaves")
        else:
            if given.prompt_cut:
                self._note(cut_text(given.prompt_cut))
            count = "1 token" if given.tokens == 1 else f"{given.tokens:,} tokens"
            if not given.text and given.ended:
                count += ", which ended the answer before it began"
            limit = "" if given.ended else ", the longest allowed (--max-new-tokens)"
            self._note(f"{count}{limit}, {rate_text(given.tokens / max(seconds, 1e-9))}")
        self._console.print()

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim")

    def _answer_style(self) -> str:
        return "bold green" if self._adapter else "bold yellow"

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


def cut_text(tokens: int) -> str:
    """What is said where a message is longer than the model takes."""
    return f"the message is too long for the model: its first {tokens:,} tokens were left out"
