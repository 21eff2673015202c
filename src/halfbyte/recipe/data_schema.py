"""What the user asked for of the rows: where they come from, and how one is rendered."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from halfbyte.recipe.cleaning import AnyFilter, wrong_setting
from halfbyte.recipe.section import Auto, Name, PositiveInt, Section, rule

RowFormat = Literal[
    "auto", "instruction", "prompt_completion", "messages", "sharegpt", "text", "jinja"
]
LossOn = Literal["answer", "assistant", "last", "flags", "all"]
LongRows = Literal["cut_right", "cut_left", "drop", "split"]

TEMPLATES = ("auto", "chat", "alpaca", "plain", "text")


class ColumnsRecipe(Section):
    """Which column of the data holds what; a name left out is looked for."""

    instruction: str | None = Field(default=None, description="Column of the task or question.")
    input: str | None = Field(default=None, description="Column of the further input, if any.")
    output: str | None = Field(default=None, description="Column of the answer to learn.")
    system: str | None = Field(default=None, description="Column of the row's system message.")
    history: str | None = Field(
        default=None,
        description="Column of what was asked and answered before: a list of [question, answer].",
    )
    messages: str | None = Field(default=None, description="Column of the conversation.")
    tools: str | None = Field(
        default=None,
        description="Column of the tools that the conversation may use: JSON schemas, as a list or "
        "as its text.",
    )
    text: str | None = Field(
        default=None, description="Column of the text, of which every token is learned."
    )


class JinjaRecipe(Section):
    """Jinja templates that make a row out of any columns: `{{ column }}`, or `row['a column']`."""

    system: str | None = Field(default=None, description="The system message.")
    user: str | None = Field(default=None, description="What the user says.")
    assistant: str | None = Field(default=None, description="The answer to learn.")
    text: str | None = Field(
        default=None, description="In place of the three: a text, of which all is learned."
    )

    @property
    def empty(self) -> bool:
        """Whether no template is given."""
        return not any(self.model_dump().values())

    @property
    def problem(self) -> str | None:
        """What is wrong with the templates together, to follow the name of the section."""
        spoken = [name for name in ("system", "user", "assistant") if getattr(self, name)]
        if self.text and spoken:
            return f"makes a text or a conversation, and has both text and {spoken[0]}."
        if spoken and not (self.user and self.assistant):
            missing = "assistant" if self.user else "user"
            return f"has {spoken[0]} and needs {missing}: a row is a question and its answer."
        return None


class SourceRecipe(Section):
    """One of several sources of rows."""

    path: Name = Field(
        description="A file, several by a pattern, a folder saved by `datasets` or a hub name, as "
        "`data.path` takes them."
    )
    split: str = Field(default="train", description="Split of a hub dataset.")
    subset: str | None = Field(default=None, description="Configuration of a hub dataset.")
    revision: str | None = Field(default=None, description="Revision of a hub dataset.")
    format: RowFormat = Field(default="auto", description="What its rows are; as `data.format`.")
    columns: ColumnsRecipe = Field(default_factory=ColumnsRecipe)
    jinja: JinjaRecipe = Field(default_factory=JinjaRecipe)
    limit: PositiveInt | None = Field(
        default=None, description="Read the first so many rows and no more."
    )
    rows: PositiveInt | None = Field(
        default=None, description="Take so many of the rows, drawn by the seed."
    )
    weight: Annotated[float, Field(gt=0)] | PositiveInt | None = Field(
        default=None,
        description="Its share among the sources with a weight; as many of their rows are taken as "
        "these shares allow. With neither `rows` nor `weight` all rows are taken.",
    )
    repeat: PositiveInt = Field(
        default=1, description="How often a row may stand in one epoch; 1 repeats none."
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.rows is not None and self.weight is not None:
            raise wrong_setting("weight", "stands beside rows; a source has one of them.")
        if self.jinja.problem is not None:
            raise wrong_setting("jinja", self.jinja.problem)
        return self

    def __str__(self) -> str:
        stated = self.model_dump(exclude={"path"}, exclude_defaults=True)
        words = [f"{k} {v}" for k, v in stated.items() if not isinstance(v, dict)]
        return f"{self.path} ({', '.join(words)})" if words else self.path


# Settings of ``data`` that say how ``data.path`` is read; in ``data.sources`` each has its own.
OF_ONE_SOURCE = ("split", "subset", "revision", "format", "columns", "jinja", "limit")


# Errors among the audit's findings (docs/audit.md), which a recipe may accept.
Acceptable = Literal[
    "doubled-begin",
    "empty-answers",
    "end-not-learned",
    "foreign-template",
    "held-out-in-training",
    "nothing-learned",
    "prompt-in-answer",
    "refused-rows",
    "same-answers",
    "template-in-rows",
    "too-long",
    "unlearned-rows",
    "wrong-labels",
]


class DataRecipe(Section):
    """The rows and how one is rendered."""

    path: Name | None = Field(
        default=None,
        description="A JSON, JSONL, CSV, Parquet or Arrow file (text also with .gz or .zst), "
        "several by a pattern such as `rows/*.jsonl`, a folder saved by `datasets`, or a dataset's "
        "name on the hub.",
    )
    sources: list[SourceRecipe] = Field(
        default_factory=list,
        description="In place of `path`, several sources and what of each is taken.",
    )
    split: str = Field(default="train", description="Split of a hub dataset.")
    subset: str | None = Field(default=None, description="Configuration of a hub dataset.")
    revision: str | None = Field(default=None, description="Revision of a hub dataset.")
    format: RowFormat = Field(
        default="auto",
        description="What a row is: `instruction` (a question, perhaps an input, and an answer), "
        "`prompt_completion`, `messages` (OpenAI's chat), `sharegpt`, `text` (all of it learned), "
        "or `jinja` (made by `data.jinja`); auto looks at the rows.",
    )
    columns: ColumnsRecipe = Field(default_factory=ColumnsRecipe)
    jinja: JinjaRecipe = Field(default_factory=JinjaRecipe)
    merge_turns: bool = Field(
        default=False,
        description="Where one side of a conversation speaks twice in a row, join the two with a "
        "blank line; else such a row is refused.",
    )
    cleaning: list[AnyFilter] = Field(
        default_factory=list,
        description="Filters that drop or mend rows, in this order, before anything else is done "
        "with them: `[{filter: exact_duplicates}, {filter: length, answer_min_words: 5}]`, or each "
        "on lines of its own. docs/cleaning.md shows what they do.",
    )
    instruction: str | None = Field(
        default=None, description="One instruction for all rows, in place of a column."
    )
    system: str | None = Field(
        default=None, description="System message of every row, for the template `chat`."
    )
    template: str = Field(
        default="auto",
        description="`chat` (the model's own chat template), `alpaca`, `plain`, `text` (none, for "
        "rows that are texts), or the text of a row's prompt with {instruction}, {input} and, at "
        "its end, {output}; auto is `text` where all rows are texts, else `chat` where the model "
        "has a chat template, else `alpaca`.",
    )
    loss_on: LossOn = Field(
        default="answer",
        description="What is learned: `answer`, all that the assistant says but messages that the "
        "row itself excludes; `assistant`, those too; `last`, the last answer alone; `flags`, only "
        "messages that the row says are learned; `all`, every token of the row. Texts are always "
        "learned whole.",
    )
    limit: PositiveInt | None = Field(
        default=None,
        description="Use the first so many rows (held-out rows not counted when they follow).",
    )
    held_out: Annotated[int, Field(ge=0)] | Auto = Field(
        default="auto", description="Rows kept for measuring; auto is 5 %, at most 200."
    )
    held_out_from: Literal["random", "after"] = Field(
        default="random",
        description="`random`: drawn by the seed out of the rows; `after`: the rows that follow "
        "the first `limit` ones, so that all of those train.",
    )
    held_out_path: str | None = Field(
        default=None, description="A data file of its own for the held-out rows."
    )
    max_length: Annotated[int, Field(ge=8)] | Auto = Field(
        default="auto",
        description="Longest row in tokens, and with `packing` the length of a pack. Auto is the "
        "99th percentile of the rows, or a pack's length for eight of them if that is more, within "
        "what the model takes.",
    )
    long_rows: LongRows = Field(
        default="cut_right",
        description="What becomes of a longer row: `cut_right` loses its end, `cut_left` its "
        "beginning (a beginning-of-sequence token stays), `drop` leaves it out, `split` makes "
        "consecutive pieces of it.",
    )
    packing: bool = Field(
        default=False,
        description="Fill packs of `max_length` tokens with whole rows (best fit), so that all "
        "forward passes are of one size. Rows stay apart: attention and positions begin anew in "
        "each, and each weighs in the loss as it does without. Then `training.batch_size` counts "
        "packs.",
    )
    cache: bool = Field(
        default=True,
        description="Keep the tokens of many rows (more than 50,000, or 64 MB of text) in the "
        "user's cache directory, $XDG_CACHE_HOME/halfbyte or ~/.cache/halfbyte, for the next run "
        "with the same rows, template and tokenizer. The last eight data sets are kept.",
    )
    accept: list[Acceptable] = Field(
        default_factory=list,
        description="Errors that the audit finds and that are meant so, by name; the others stop "
        "the run before its first step.",
    )

    @property
    def all_sources(self) -> list[SourceRecipe]:
        """``sources``, or the one that ``path`` names."""
        if self.path is None:
            return self.sources
        one = {name: getattr(self, name) for name in OF_ONE_SOURCE}
        return [SourceRecipe(path=self.path, **one)]

    @property
    def name(self) -> str:
        """The paths of the sources, in one line."""
        return ", ".join(source.path for source in self.all_sources)

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if self.path is None and not self.sources:
            raise rule(
                "data.path",
                "is missing. It is needed: a JSON, JSONL, CSV, Parquet or Arrow file, a folder "
                "saved by `datasets`, or a dataset's name on the hub; data.sources takes several.",
            )
        if self.jinja.problem is not None:
            raise rule("data.jinja", self.jinja.problem)
        if self.path is not None and self.sources:
            raise rule("data.sources", "stands in place of data.path; leave one of the two out.")
        if self.sources:
            for name in OF_ONE_SOURCE:
                if getattr(self, name) != type(self).model_fields[name].get_default(
                    call_default_factory=True
                ):
                    raise rule(
                        f"data.{name}", "is for data.path; in data.sources each source has its own."
                    )
            if self.held_out_from == "after":
                raise rule(
                    "data.held_out_from",
                    "must be random where there is data.sources: no row follows those of all.",
                )
        return self

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.template.strip() not in TEMPLATES and "{output}" not in self.template:
            raise rule(
                "data.template",
                "must be auto, chat, alpaca or plain, or the text of a row with {output} in it.",
            )
        return self
