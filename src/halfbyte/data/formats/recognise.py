"""Which format the rows of a source have: what the recipe says, or what they look like.

What could be two things is asked for, since a run is too dear for a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.data.columns import (
    CONVERSATION_NAMES,
    INPUT_NAMES,
    INSTRUCTION_NAMES,
    LOOKED_AT,
    OUTPUT_NAMES,
    REJECTED,
    Columns,
    check_named,
    find_columns,
    find_history,
    find_system,
    listed,
    plain,
    texts_of,
)
from halfbyte.data.formats.cells import is_missing
from halfbyte.data.formats.conversation import Conversations
from halfbyte.data.formats.format import Format
from halfbyte.data.formats.instruction import Instructions
from halfbyte.data.formats.jinja_rows import JinjaRows
from halfbyte.data.formats.messages import looks_like_messages, speaks_sharegpt
from halfbyte.data.formats.prompt_completion import PromptCompletions
from halfbyte.data.formats.text import Texts
from halfbyte.data.table import Table
from halfbyte.errors import DataError
from halfbyte.recipe.data_schema import SourceRecipe

COMPLETION_NAMES = ("completion", "chosen")
TOOLS_NAMES = ("tools", "functions")
TEXT_NAME = "text"
QUESTION = ("instruction", "input", "output", "system", "history")
# The roles of data.columns that a format has a use for.
ROLES = {
    "instruction": QUESTION,
    "prompt_completion": (*QUESTION, "tools"),
    "messages": ("messages", "tools", "system"),
    "sharegpt": ("messages", "tools", "system"),
    "text": ("text",),
    "jinja": (),
}


@dataclass(frozen=True)
class Recognised:
    """A format, why it was taken (None where the recipe states it), and what to warn of."""

    format: Format
    why: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def texts(self) -> bool:
        """Whether its rows are texts, without questions."""
        return isinstance(self.format, Texts) or (
            isinstance(self.format, JinjaRows) and self.format.makes_texts
        )


def recognise(
    source: SourceRecipe,
    table: Table,
    *,
    fixed_instruction: bool = False,
    merge_turns: bool = False,
    by_content: bool = False,
) -> Recognised:
    """The format of ``table``, which was read from ``source``.

    With ``fixed_instruction`` all rows share an instruction, so they are questions. Where no
    column is named like an answer, the longest texts are taken for it if ``by_content``, for
    somebody who is shown what comes of it. Raises DataError where the rows are of no format, or
    may be of two.
    """
    check_named(source, table)
    look = _Look(source, table, fixed_instruction, merge_turns, by_content)
    name: str = source.format
    why = None
    if name == "auto":
        name, why = look.guess()
    for role in source.columns.model_dump(exclude_none=True):
        if role not in ROLES[name]:
            raise DataError(
                f"data.columns.{role} says nothing to rows of the format {name}; "
                f"{'it takes ' + ', '.join(ROLES[name]) if ROLES[name] else 'it takes none'}."
            )
    if fixed_instruction and name not in ("instruction", "prompt_completion"):
        raise DataError(
            f"data.instruction gives questions one instruction, and the rows of {source.path} are "
            f"of the format {name}; leave it out."
        )
    if (name == "jinja") == source.jinja.empty:
        todo = "give data.jinja.user and data.jinja.assistant, or data.jinja.text"
        if name != "jinja":
            todo = "leave data.jinja out or state data.format: jinja"
        raise DataError(f"the format of {source.path} is {name}; {todo}.")
    format = look.format(name)
    return Recognised(format, why, look.warnings(format) if why is not None else ())


class _Look:
    """One look at the first rows of a table."""

    def __init__(
        self,
        source: SourceRecipe,
        table: Table,
        fixed_instruction: bool,
        merge_turns: bool,
        by_content: bool,
    ) -> None:
        self.source, self.table = source, table
        self.fixed_instruction, self.merge_turns = fixed_instruction, merge_turns
        self.by_content = by_content
        self.rows = table.rows[:LOOKED_AT]
        self.named = {plain(name): name for name in reversed(table.columns)}
        self.spoken = [name for name in table.columns if self._is_spoken(name)]
        self.history, self.why_history = find_history(source, table)

    def _is_spoken(self, column: str) -> bool:
        """Whether at least half of a column's cells, empty ones apart, are conversations."""
        cells = [cell for row in self.rows if not is_missing(cell := row.get(column))]
        return bool(cells) and 2 * sum(map(looks_like_messages, cells)) >= len(cells)

    def guess(self) -> tuple[str, str]:
        """The name of the format, and why it is that."""
        columns = self.source.columns
        if not self.source.jinja.empty:
            return "jinja", "data.jinja makes the rows"
        if columns.messages is not None:
            return self._style(columns.messages), "data.columns.messages names the conversations"
        if columns.text is not None:
            return "text", "data.columns.text names the text"
        asked = [c for c in (columns.instruction, columns.input, columns.output) if c is not None]
        if asked:
            if any(column in self.spoken for column in asked):
                return "prompt_completion", f"the column {asked[-1]} holds messages"
            return "instruction", "data.columns names a question or an answer"
        column = self._conversation()
        if column is not None:
            style = self._style(column)
            keys = "from and value" if style == "sharegpt" else "role and content"
            beside = self._beside(column)
            return style, f"the column {column} holds messages with {keys}{beside}"
        if self._prompt_and_completion():
            return "prompt_completion", self._why_completion()
        return self._texts()

    def _conversation(self) -> str | None:
        """The column of whole conversations; an error where there are two."""
        parts = (*COMPLETION_NAMES, REJECTED, *INSTRUCTION_NAMES, *OUTPUT_NAMES)
        whole = [name for name in self.spoken if plain(name) not in parts]
        if self.history in whole and not set(self.named).isdisjoint(OUTPUT_NAMES):
            whole.remove(self.history)  # which leads to the row's own question
        found = [name for name in whole if plain(name) in CONVERSATION_NAMES] or whole
        if len(found) > 1:
            raise DataError(
                f"the columns {listed(found)} of {self.source.path} all hold conversations; state "
                "in data.columns.messages which of them to train."
            )
        return found[0] if found else None

    def _style(self, column: str) -> str:
        cells = (cell for row in self.rows if not is_missing(cell := row.get(column)))
        first = next((cell for cell in cells if looks_like_messages(cell)), None)
        return "sharegpt" if first is not None and speaks_sharegpt(first) else "messages"

    def _beside(self, column: str) -> str:
        """What else the table holds that might have been trained."""
        known = (*INSTRUCTION_NAMES, *OUTPUT_NAMES, TEXT_NAME)
        others = [name for name in self.table.columns if plain(name) in known and name != column]
        return f", so {listed(others)} beside it is not read" if others else ""

    def _prompt_and_completion(self) -> bool:
        if "chosen" in self.named and REJECTED in self.named:
            return True
        if any(self.named.get(name) in self.spoken for name in ("prompt", *COMPLETION_NAMES)):
            return True
        return "prompt" in self.named and "completion" in self.named

    def _why_completion(self) -> str:
        if "completion" not in self.named and "chosen" in self.named:
            return "chosen and rejected are a preference; chosen is learned, rejected is left out"
        return "there are a prompt and what completes it"

    def _texts(self) -> tuple[str, str]:
        """Questions and answers where an answer is named like one, else texts."""
        texts = texts_of(self.table.columns, self.rows)
        text = self.named.get(TEXT_NAME)
        only = next(iter(texts)) if len(texts) == 1 else None
        known = (*INSTRUCTION_NAMES, *INPUT_NAMES, *OUTPUT_NAMES)
        if not self.fixed_instruction and not set(self.named) & set(OUTPUT_NAMES):
            if text in texts:
                return "text", "there is a column text and none that is named like an answer"
            if only is not None and plain(only) not in (*known, *CONVERSATION_NAMES):
                return "text", f"{only} is the only column of text"
        found = self._questions()
        beside = (
            f", so {text} beside it is not read"
            if text in texts and text not in (found.by_role().values())
            else ""
        )
        return "instruction", f"there are a question and its answer{beside}"

    def _questions(self) -> Columns:
        return find_columns(
            self.source,
            self.table,
            fixed_instruction=self.fixed_instruction,
            by_content=self.by_content,
        )

    def format(self, name: str) -> Format:
        """The format of that name, with its columns."""
        source, table = self.source, self.table
        if name == "jinja":
            return JinjaRows(source.jinja, table.columns)
        if name == "text":
            return self._text()
        if name in ("messages", "sharegpt"):
            return self._conversations(name)
        if name == "prompt_completion":
            return self._prompts()
        return Instructions(self._questions(), merge_turns=self.merge_turns)

    def _text(self) -> Texts:
        if self.source.columns.text is not None:
            return Texts(self.source.columns.text)
        texts = texts_of(self.table.columns, self.rows)
        if self.named.get(TEXT_NAME) in texts:
            column = self.named[TEXT_NAME]
            return Texts(column, {"text": f"the column is named {column}"})
        if len(texts) != 1:
            raise DataError(
                f"data.format: text, and {self.source.path} has no column named text but "
                f"{listed(self.table.columns)}; state data.columns.text."
            )
        return Texts(next(iter(texts)), {"text": "it is the only column of text"})

    def _conversations(self, name: str) -> Conversations:
        column, reason = self.source.columns.messages, {}
        if column is None:
            column = self._conversation() or next(
                (self.named[known] for known in CONVERSATION_NAMES if known in self.named), None
            )
            if column is None:
                raise DataError(
                    f"data.format: {name}, and no column of {self.source.path} holds messages "
                    f"(there are {listed(self.table.columns)}); state data.columns.messages."
                )
            named = plain(column) in CONVERSATION_NAMES
            reason["messages"] = (
                f"the column is named {column}" if named else "its cells are lists of messages"
            )
        tools = self._tools(reason)
        system, why = find_system(self.source, self.table, [column])
        return Conversations(name, column, tools, system, {**reason, **why}, self.merge_turns)

    def _tools(self, reason: dict[str, str]) -> str | None:
        if self.source.columns.tools is not None:
            return self.source.columns.tools
        for known in TOOLS_NAMES:
            if known in self.named:
                reason["tools"] = f"the column is named {self.named[known]}"
                return self.named[known]
        return None

    def _prompts(self) -> PromptCompletions:
        asked = self.source.columns
        reason: dict[str, str] = {}
        completion, prompt = asked.output, asked.instruction or asked.input
        if self.fixed_instruction and asked.instruction is not None:
            # The same sentence as for questions and answers.
            find_columns(self.source, self.table, fixed_instruction=True)
        if completion is None:
            known = [*COMPLETION_NAMES, *OUTPUT_NAMES]
            completion = next((self.named[n] for n in known if n in self.named), None)
            if completion is None:
                raise DataError(
                    f"data.format: prompt_completion, and {self.source.path} has no completion "
                    f"(there are {listed(self.table.columns)}); state data.columns.output."
                )
            reason["output"] = f"the column is named {completion}"
        if prompt is None:
            known = ["prompt", *INSTRUCTION_NAMES, *INPUT_NAMES]
            taken = (completion, self.named.get(REJECTED))
            found = (self.named[n] for n in known if n in self.named)
            prompt = next((name for name in found if name not in taken), None)
            if prompt is not None:
                role = "input" if self.fixed_instruction else "instruction"
                reason[role] = f"the column is named {prompt}"
        if prompt is None and completion not in self.spoken:
            raise DataError(
                f"{self.source.path} has a completion, {completion}, and no column of what it "
                f"completes (there are {listed(self.table.columns)}); state "
                "data.columns.instruction, or data.format: text with data.columns.text to train "
                "all of a text."
            )
        tools = self._tools(reason)
        system, why = find_system(self.source, self.table, [completion, prompt or completion])
        history, why_history = self.history, self.why_history
        if history is not None and (completion in self.spoken or prompt in self.spoken):
            if self.source.columns.history is not None:
                raise DataError(
                    f"data.columns.history: the prompts or completions of {self.source.path} are "
                    "conversations already, to which it has no place; leave it out."
                )
            history, why_history = None, {}
        return PromptCompletions(
            prompt,
            completion,
            system,
            history,
            tools,
            rejected=self.named.get(REJECTED) if prompt is None else None,
            label=self._label(completion),
            as_input=self.fixed_instruction,
            merge_turns=self.merge_turns,
            reason={**reason, **why, **why_history},
        )

    def _label(self, completion: str) -> str | None:
        """The column that tells good completions from bad ones, if there is one."""
        label = self.named.get("label")
        if label is None or label == completion:
            return None
        return label if any(isinstance(row.get(label), bool) for row in self.rows) else None

    def warnings(self, format: Format) -> tuple[str, ...]:
        """What about texts that were guessed to be such the user may not expect."""
        column = format.by_role().get("text")
        if column is None:
            return ()
        from halfbyte.data.audit.template_match import family_of  # which imports PyTorch

        texts = [cell for row in self.rows if isinstance(cell := row.get(column), str)]
        families = [found[0] for text in texts if (found := family_of(text)) is not None]
        if not families or 2 * len(families) < len(texts):
            return ()
        return (
            f"{self.source.path}: the column {column} holds conversations that are rendered "
            f"already (in the format of {families[0]}), and the loss is taken on all of a text, "
            "questions included; give questions and answers in columns, or state data.format: text "
            "if it is meant so.",
        )


def sentence_of_columns(format: Format, names: Sequence[str]) -> list[str]:
    """What each column is for and why, a line each, and those that are not read."""
    lines = [
        f"{role} from {column!r}: {format.reason.get(role, 'its name says so')}"
        for role, column in format.by_role().items()
    ]
    unused = [name for name in names if name not in format.by_role().values()]
    if unused and not isinstance(format, JinjaRows):
        lines.append("not used: " + ", ".join(map(repr, unused)))
    return lines
