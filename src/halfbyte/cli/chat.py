"""``halfbyte chat``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.options import AdapterFolder, BaseModel, DeviceName, require_device
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from halfbyte.cli.chat_answer import ChatSettings
    from halfbyte.finished.opened import OpenedAdapter


def chat(
    folder: AdapterFolder = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message (or instruction).")
    ] = None,
    temperature: Annotated[
        float, typer.Option(metavar="X", min=0.0, help="0 takes the likeliest token, always.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(metavar="P", min=1e-6, max=1.0, help="Draw from the likeliest with sum P."),
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(metavar="K", min=0, help="Draw from the K likeliest; 0: from all.")
    ] = 0,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="X", min=0.01, help="Over 1: tokens said before, less often.")
    ] = 1.0,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Longest answer in tokens.")
    ] = 512,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of what is drawn.")] = 0,
    base: BaseModel = None,
    device: DeviceName = "auto",
) -> None:
    """Talk with a fine-tuned model, in the format that was trained.

    Text in a pipe is one message, and its answer all that is printed:
    echo "Hello" | halfbyte chat
    """
    require_device(device)
    message = None if sys.stdin.isatty() else _read_message()
    from halfbyte.cli.chat_answer import ChatSettings
    from halfbyte.run.folder import latest_run

    settings = ChatSettings(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    named = folder or latest_run()
    if message is None:
        _talk(named, base, system, settings, device)
    else:
        _answer_once(_load(named, base, device), message, system, settings)


def _read_message() -> str:
    """All of standard input, without the line break at its end."""
    reconfigure = getattr(sys.stdin, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")
    message = sys.stdin.read().rstrip("\r\n")
    if not message.strip():
        raise HalfbyteError(
            'standard input is empty, so there is no message to answer; try echo "Hello" | '
            "halfbyte chat, or type halfbyte chat in a terminal."
        )
    return message


def _load(folder: Path, base: str | None, device: str) -> OpenedAdapter:
    from transformers.utils import logging

    from halfbyte.finished import open_adapter

    logging.set_verbosity_error()  # its advice is for programmers, and would stand in the talk
    return open_adapter(folder, base=base, device=device)


def _talk(
    folder: Path, base: str | None, system: str | None, settings: ChatSettings, device: str
) -> None:
    from halfbyte.cli.chat_session import Session
    from halfbyte.cli.display import make_console

    console = make_console()
    if console.is_terminal:
        with console.status("loading the model …"):
            opened = _load(folder, base, device)
    else:
        opened = _load(folder, base, device)
    Session(opened, settings, console, system=system).run()


def _answer_once(
    opened: OpenedAdapter, message: str, system: str | None, settings: ChatSettings
) -> None:
    """Print the answer to ``message`` as it comes, and nothing else, on standard output."""
    from halfbyte.cli.chat_answer import answer_message, cut_text, make_conversation

    conversation = make_conversation(opened, settings, system)

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    try:
        given = answer_message(opened, conversation.prompt(message).prompt, settings, write)
        write("\n")
    except BrokenPipeError:
        # The reader (head, less) has enough; Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if given.prompt_cut:
        print(cut_text(given.prompt_cut), file=sys.stderr)
