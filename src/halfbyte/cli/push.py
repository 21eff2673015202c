"""``halfbyte push``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from halfbyte.finished.parcel_files import Parcel, What
    from halfbyte.finished.pushing import Sent

_HEAD_LINES = 40
_LEFT_NAMED = 8
_NAMES = {"adapter": "the adapter", "model": "the model", "gguf": "the GGUF model"}


def push(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Run, adapter in PEFT's format, merged model, or GGUF file."
        ),
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub.")],
    public: Annotated[
        bool, typer.Option("--public/--private", help="Who may read a repository that is made.")
    ] = False,
    what: Annotated[
        str | None,
        typer.Option(
            "--what",
            metavar="WHAT",
            help="adapter, model or gguf; by default what DIR holds.",
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="NAME", help="The base model's name on the hub.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Send the run's report too; it shows rows of the data.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch, made if need be; else main.")
    ] = None,
    message: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Message of the commit.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be sent; needs no token.")
    ] = False,
) -> None:
    """Send an adapter or a model with its card to a hub, into a private repository.

    Nothing else goes along: no checkpoints, rows or records, and the report only with --report,
    since it shows rows of the data. What is there already is not sent again. The token is HF_TOKEN
    or what hf auth login keeps.
    """
    if what not in (None, "adapter", "model", "gguf"):
        raise HalfbyteError(f"--what {what} is none of adapter, model and gguf.")
    if message is not None and not message.strip():
        raise HalfbyteError("--message is empty; say what changes, or leave it out.")
    from halfbyte.finished.parcel import pack
    from halfbyte.finished.pushing import branch, push, repository

    repo, revision = repository(repo), branch(revision)
    kind = cast("What | None", what)
    parcel = pack(folder, repo, what=kind, base=base, report=report)
    _show(parcel, repo, public=public, revision=revision, dry_run=dry_run)
    if dry_run:
        return
    with _waiting(f"sending to {repo} …"):
        sent = push(
            parcel,
            repo,
            public=public,
            revision=revision,
            message=message or f"{_NAMES[parcel.what].capitalize()}, by halfbyte",
        )
    _tell(sent, parcel, repo, public=public)


def _show(parcel: Parcel, repo: str, *, public: bool, revision: str | None, dry_run: bool) -> None:
    from halfbyte.cli.units import bytes_text, visible

    who = "open to all" if public else "private"
    where = f"{repo}, branch {revision}" if revision else repo
    typer.echo(visible(f"{_NAMES[parcel.what]} of {parcel.folder} → {where} ({who})"))
    typer.echo()
    sizes = parcel.sizes()
    width = max(len(visible(name)) for name in sizes)
    for name, size in sizes.items():
        typer.echo(f"  {visible(name):{width}}  {bytes_text(size):>9}")
    typer.echo(f"  {'':{width}}  {bytes_text(sum(sizes.values())):>9}")
    typer.echo()
    if parcel.left:
        named = len(parcel.left) if len(parcel.left) < _LEFT_NAMED + 4 else _LEFT_NAMED
        some, more = ", ".join(parcel.left[:named]), len(parcel.left) - named
        typer.echo(_wrapped(f"Not sent: {some}{f' and {more} more' if more > 0 else ''}."))
    for sentence in parcel.said:
        typer.echo(_wrapped(sentence))
    if dry_run:
        lines = parcel.card.split("\n")
        typer.echo("The card, README.md, begins with:\n")
        typer.echo("\n".join(f"  {visible(line)}".rstrip() for line in lines[:_HEAD_LINES]))
        if len(lines) > _HEAD_LINES:
            typer.echo(f"  … and {len(lines) - _HEAD_LINES} lines more")
        typer.echo("\nNothing was sent (--dry-run).")


def _tell(sent: Sent, parcel: Parcel, repo: str, *, public: bool) -> None:
    state = "open to all" if sent.public else "private"
    made = f"made, {state}" if sent.made else state
    if not sent.files:
        typer.echo(f"All of it was in {repo} already ({made}).")
        return
    count, same = len(sent.files), len(parcel.files) - len(sent.files)
    rest = f", {same} {'was' if same == 1 else 'were'} there already" if same else ""
    typer.echo(f"Sent {count} {'file' if count == 1 else 'files'} to {repo} ({made}){rest}.")
    if public and not sent.public:
        typer.echo("The repository was there and is private; open it on the hub.")


def _waiting(text: str) -> AbstractContextManager[object]:
    from halfbyte.cli.display import make_console

    console = make_console()
    return console.status(text) if console.is_terminal else nullcontext()


def _wrapped(text: str) -> str:
    import textwrap

    from halfbyte.cli.units import visible

    return textwrap.fill(visible(text), 80, break_long_words=False, break_on_hyphens=False)
