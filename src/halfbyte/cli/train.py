"""``halfbyte train``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from halfbyte.cli.errors import STOPPED
from halfbyte.errors import RunError

if TYPE_CHECKING:
    from halfbyte.cli.asked import Asked
    from halfbyte.cli.display import Display
    from halfbyte.run import Run

LATEST = "runs/latest"
AUTO = "auto"


class Train(TyperCommand):
    """Lets ``--resume`` stand without a value; it then means the latest run."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        if "--resume" in args:
            after = args.index("--resume") + 1
            if after == len(args) or args[after].startswith("-"):
                args = [*args[:after], LATEST, *args[after:]]
        return super().parse_args(ctx, args)


def train(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE.yaml", help="What to train.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Base model, where there is no recipe or in its place."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Rows, where there is no recipe or in its place."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: lora.r=8. Repeatable."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run folder; by default runs/<recipe>-<date>-<n>."),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Train for so many steps at most.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="[DIR|auto]",
            help="Go on with an interrupted run, or the latest one; auto with a recipe goes on "
            "with its run, or begins one.",
        ),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="With --resume: what may be another than when the run began, machine or a "
            "setting. Repeatable.",
        ),
    ] = None,
    mirror: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Copy finished checkpoints to a folder or hf://owner/repo; with --resume, bring "
            "a lost run back from there.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that --out holds.")
    ] = False,
) -> None:
    """Fine-tune a model as RECIPE.yaml says, or with the defaults for --model and --data.

    Ctrl-C once finishes the step, saves a checkpoint and says how to go on.
    """
    auto = resume is not None and str(resume) == AUTO
    if resume is not None:
        given = {
            "RECIPE.yaml": recipe and not auto,
            "--model": model and not auto,
            "--data": data and not auto,
            "--out": out and not auto,
            "--max-steps": max_steps and not auto,
            "--dry-run": dry_run,
            "--overwrite": overwrite,
        }
        refused = [name for name, value in given.items() if value]
        if refused:
            raise RunError(
                f"--resume {resume} goes on with a run that was begun; leave out "
                f"{', '.join(refused)}."
            )
    elif allow:
        raise RunError("--allow is for a run that goes on; give it with --resume.")
    if resume is not None and not auto:
        _resume(resume, set_ or [], allow or [], mirror)
        return
    from halfbyte.cli.asked import asked_for

    asked = asked_for(recipe, model=model, data=data, overrides=set_ or [])
    if dry_run:
        _rehearse(asked, out, max_steps, overwrite)
        return
    start(
        asked,
        out=out,
        max_steps=max_steps,
        overwrite=overwrite,
        resume=AUTO if auto else None,
        allow=allow or [],
        mirror=mirror,
    )


def start(
    asked: Asked,
    *,
    out: Path | None,
    max_steps: int | None,
    overwrite: bool,
    resume: str | None = None,
    allow: Sequence[str] = (),
    mirror: str | None = None,
    answers: int = 1,
    hints: Sequence[str] = (),
) -> None:
    """Train what was asked for and show it; ends the command with 130 where it was stopped.

    At the end so many ``answers`` are shown, and ``hints`` among what to type next.
    """
    from halfbyte.cli.display import Display

    display = Display(logging_steps=asked.recipe.training.logging_steps)

    def run() -> Run:
        with display.phase("libraries"):
            from halfbyte.run import train as run_training
        return run_training(
            asked.recipe,
            out=out,
            recipe_name=asked.name,
            asked=asked.text,
            max_steps=max_steps,
            overwrite=overwrite,
            resume=resume,
            allow=allow,
            mirror=mirror,
            listeners=[display],
            command=_typed(),
            recipe_folder=asked.folder,
        )

    _show(display, run, answers, hints)


def _resume(
    folder: Path, overrides: Sequence[str], allow: Sequence[str], mirror: str | None
) -> None:
    """Go on with the run of ``folder``; a setting that is given anew is allowed to change."""
    from halfbyte.cli.display import Display
    from halfbyte.cli.folders import run_folder
    from halfbyte.recipe.load import load_recipe
    from halfbyte.run.changes import may_change

    if mirror is None or folder.exists() or str(folder) == LATEST:
        folder = run_folder(folder if str(folder) != LATEST else None)
    effective = folder / "recipe.yaml"
    recipe = load_recipe(effective, overrides) if effective.exists() else None
    named = [key for key in (text.split("=")[0].strip() for text in overrides) if may_change(key)]
    display = Display(logging_steps=recipe.training.logging_steps if recipe else 10)

    def run() -> Run:
        with display.phase("libraries"):
            from halfbyte.run import train as run_training
        return run_training(
            recipe if overrides else None,
            resume=folder,
            allow=[*allow, *named],
            mirror=mirror,
            listeners=[display],
            command=_typed(),
        )

    _show(display, run)


def _show(
    display: Display, run: Callable[[], Run], answers: int = 1, hints: Sequence[str] = ()
) -> None:
    from halfbyte.cli.summary import show_finished, show_interrupted, show_stopped_at_once
    from halfbyte.run.interrupt import exit_code

    try:
        done = run()
    except (KeyboardInterrupt, SystemExit) as stopped:
        display.close()
        show_stopped_at_once(display, display.folder)
        code = stopped.code if isinstance(stopped, SystemExit) else STOPPED
        raise typer.Exit(int(code or 0)) from None
    finally:
        display.close()
    if done.interrupted:
        show_interrupted(display, done)
        raise typer.Exit(exit_code(done.signal))
    show_finished(display, done, answers=answers, hints=hints)


def _rehearse(asked: Asked, out: Path | None, max_steps: int | None, overwrite: bool) -> None:
    from halfbyte.cli.blocks import Block
    from halfbyte.cli.display import Display

    display = Display()
    try:
        with display.phase("libraries"):
            from halfbyte.run import rehearse
            from halfbyte.run.folder import refuse_if_taken
        if out is not None and not overwrite:
            refuse_if_taken(out)
        rehearsal = rehearse(
            asked.recipe, max_steps=max_steps, recipe_folder=asked.folder, listeners=[display]
        )
    finally:
        display.close()
    training = rehearsal.recipe.training
    a_step = int(training.batch_size) * int(training.gradient_accumulation)
    what = "packs" if rehearsal.recipe.data.packing else "rows"
    lines = [f"{rehearsal.steps:,} steps of {a_step:,} {what}; nothing was written"]
    display.block(Block("would train", lines), "bold green")


def _typed() -> list[str]:
    """The command as typed, for the record; the program's own path is left out."""
    return ["halfbyte", *sys.argv[1:]]
