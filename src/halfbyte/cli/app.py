"""The commands of ``halfbyte``; each lives in a module of its own that is light to import."""

from __future__ import annotations

from typing import Annotated

import typer

import halfbyte
from halfbyte.cli.bench import bench
from halfbyte.cli.chat import chat
from halfbyte.cli.combine import combine
from halfbyte.cli.compare import compare
from halfbyte.cli.data import data
from halfbyte.cli.demo import demo
from halfbyte.cli.doctor import doctor
from halfbyte.cli.errors import Commands
from halfbyte.cli.evaluate import evaluate
from halfbyte.cli.export import export
from halfbyte.cli.init import init
from halfbyte.cli.merge import merge
from halfbyte.cli.push import push
from halfbyte.cli.recipe import recipe
from halfbyte.cli.reduce import reduce
from halfbyte.cli.report import report
from halfbyte.cli.status import status
from halfbyte.cli.train import Train, train

app = typer.Typer(
    cls=Commands,
    name="halfbyte",
    help="Fine-tune a language model with QLoRA: one recipe, one command, one report.",
    epilog="Begin with: halfbyte demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Help in panels imports rich and its Markdown reader, which takes as long again as the rest.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command(cls=Train, short_help="Fine-tune a model as a recipe says.")(train)
app.command(short_help="Write a recipe for your own rows.")(init)
app.command(short_help="Show what training will see, and what is wrong with it.")(data)
app.command(short_help="Show a recipe's settings, each with its reason.")(recipe)
app.command(short_help="Write a run's report again, or compare several.")(report)
app.command(short_help="Say whether a run goes on, hangs or has ended.")(status)
app.command(short_help="Talk with a fine-tuned model.")(chat)
app.command(short_help="Judge an adapter against its base model.")(evaluate)
app.command(short_help="Lay the answers of several models side by side.")(compare)
app.command(short_help="Write base model and adapter as one model.")(merge)
app.command(short_help="Make several adapters one.")(combine)
app.command(short_help="Give an adapter a lower rank.")(reduce)
app.command(short_help="Write a model for llama.cpp and Ollama.")(export)
app.command(short_help="Send an adapter or a model to a hub.")(push)
app.command(short_help="Fine-tune a small real model here and now.")(demo)
app.command(short_help="Say what of this machine is used, what is missing.")(doctor)
app.command(short_help="Measure a training step and this machine.")(bench)


def _version(asked: bool) -> None:
    if asked:
        print(f"halfbyte {halfbyte.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
