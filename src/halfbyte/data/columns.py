"""Which column holds the instruction, the input and the answer."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from halfbyte.data.formats.cells import is_missing
from halfbyte.data.table import Cells, Table
from halfbyte.errors import DataError
from halfbyte.recipe.data_schema import SourceRecipe

# Names that datasets give these columns, the surest first; compared without case, and with
# anything but letters and digits left out.
INSTRUCTION_NAMES = (
    "instruction",
    "instructions",
    "prompt",
    "question",
    "query",
    "task",
    "problem",
    "request",
    "user",
    "human",
    "ask",
    "usermessage",
    "inputtext",
    "sentence",
)
INPUT_NAMES = (
    "input",
    "inputs",
    "context",
    "passage",
    "document",
    "background",
    "article",
    "additionalinput",
)
OUTPUT_NAMES = (
    "output",
    "outputs",
    "response",
    "answer",
    "answers",
    "completion",
    "target",
    "reply",
    "assistant",
    "solution",
    "result",
    "summary",
    "targettext",
    "outputtext",
    "responses",
    "chosen",
    "label",
    "translation",
)
HISTORY_NAME = "history"
SYSTEM_NAMES = ("system", "systemprompt", "systemmessage")
CONVERSATION_NAMES = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
# The worse answer of a preference; no question either.
REJECTED = "rejected"

# Rows looked at to guess by content.
LOOKED_AT = 100


@dataclass(frozen=True)
class Columns:
    """A column for each role; ``reason`` says, for a role that was guessed, how."""

    output: str
    instruction: str | None = None
    input: str | None = None
    reason: dict[str, str] = field(default_factory=dict)
    by_content: bool = False  # the answer's column was told by its texts, not by its name
    system: str | None = None
    history: str | None = None  # what was asked and answered before

    def by_role(self) -> dict[str, str]:
        """Role to column, of the roles that have one."""
        roles = {
            "system": self.system,
            "instruction": self.instruction,
            "input": self.input,
            "output": self.output,
            "history": self.history,
        }
        return {role: column for role, column in roles.items() if column is not None}


def guess_columns(
    names: Sequence[str], rows: Sequence[Cells], *, fixed_instruction: bool = False
) -> Columns:
    """The likely columns of a table, by their names and, where those say nothing, by content.

    The answer's column is then the one with the longest texts, the question's the one before it
    in the table. With ``fixed_instruction`` all rows share an instruction and the question is
    their input. Raises DataError where there are not two columns of text to tell apart.
    """
    names = [name for name in names if plain(name) not in (*SYSTEM_NAMES, REJECTED)]
    by_name = {plain(name): name for name in reversed(names)}
    reason: dict[str, str] = {}

    def named(candidates: Sequence[str], taken: Sequence[str | None], role: str) -> str | None:
        for candidate in candidates:
            column = by_name.get(candidate)
            if column is not None and column not in taken:
                reason[role] = f"the column is named {column}"
                return column
        return None

    output = named(OUTPUT_NAMES, [], "output")
    instruction = named(INSTRUCTION_NAMES, [output], "instruction")
    input = named(INPUT_NAMES, [output, instruction], "input")
    by_content = output is None
    if output is None:
        output = _longest(names, rows, taken=[])
        if output is None or len(texts_of(names, rows)) < 2 or _conversation(names):
            raise DataError(_no_columns(names))
        reason["output"] = "its texts are the longest"
        instruction, input = (None if c == output else c for c in (instruction, input))
    if instruction is None and input is None:
        instruction = _longest(names, rows, taken=[output])
        reason["instruction"] = "it is the text beside the answer"
    if instruction is None and not fixed_instruction:
        instruction, input = input, None
        reason["instruction"] = "it is the text beside the answer"
    if fixed_instruction and input is None:
        instruction, input = None, instruction
        reason["input"] = "all rows share an instruction, so the question is the input"
    if fixed_instruction:
        instruction = None
    if instruction is None and input is None:
        raise DataError(_no_columns(names))
    columns = Columns(output, instruction, input, {}, by_content)
    kept = {role: text for role, text in reason.items() if role in columns.by_role()}
    return Columns(output, instruction, input, kept, by_content)


def check_named(source: SourceRecipe, table: Table) -> None:
    """Raise DataError where the recipe names a column that is not there, or one for two roles."""
    asked = source.columns.model_dump(exclude_none=True)
    for role, column in asked.items():
        if column not in table.columns:
            raise DataError(
                f"data.columns.{role}: {source.path} has no column {column}"
                f"{nearest(column, table.columns)}; it has {listed(table.columns)}."
            )
    if len(set(asked.values())) < len(asked):
        raise DataError("data.columns names one column for two roles; each has its own.")


def find_columns(
    source: SourceRecipe,
    table: Table,
    *,
    fixed_instruction: bool = False,
    by_content: bool = False,
) -> Columns:
    """The columns of questions and answers that the recipe names, the rest guessed.

    Raises DataError where a named column is not there, where none can be guessed, or where the
    answer could only be guessed by content: a run is too dear for that, so it is asked for
    unless ``by_content`` allows it.
    """
    check_named(source, table)
    columns = _questions(source, table, fixed_instruction, by_content)
    system, reason = find_system(source, table, list(columns.by_role().values()))
    history, why = find_history(source, table)
    reason = {**columns.reason, **reason, **why}
    return replace(columns, system=system, history=history, reason=reason)


def find_system(
    source: SourceRecipe, table: Table, taken: Sequence[str]
) -> tuple[str | None, dict[str, str]]:
    """The column of system messages, named or by its name, and the reason where it was guessed."""
    if source.columns.system is not None:
        return source.columns.system, {}
    names = [n for n in table.columns if plain(n) in SYSTEM_NAMES and n not in taken]
    found = next(iter(texts_of(names, table.rows)), None)
    return found, {} if found is None else {"system": f"the column is named {found}"}


def find_history(source: SourceRecipe, table: Table) -> tuple[str | None, dict[str, str]]:
    """The column of what was said before, named or by its name, and the reason if guessed.

    By its name only where at least half of its cells, empty ones apart, are lists: a patient's
    history is a text.
    """
    asked = source.columns.model_dump(exclude_none=True)
    if "history" in asked:
        return source.columns.history, {}
    for name in table.columns:
        if plain(name) != HISTORY_NAME or name in asked.values():
            continue
        cells = [row.get(name) for row in table.rows[:LOOKED_AT]]
        lists = sum(map(_is_list, cells))
        if lists and 2 * lists >= sum(_is_list(cell) or not is_missing(cell) for cell in cells):
            return name, {"history": f"the column is named {name} and holds lists"}
    return None, {}


def _is_list(cell: object) -> bool:
    if isinstance(cell, str):
        return cell.lstrip().startswith("[")
    return isinstance(cell, (list, tuple))


def _questions(
    source: SourceRecipe, table: Table, fixed_instruction: bool, by_content: bool
) -> Columns:
    roles = ("instruction", "input", "output")
    asked = source.columns.model_dump(include=set(roles), exclude_none=True)
    if fixed_instruction and "instruction" in asked:
        raise DataError(
            "data.instruction gives all rows one instruction and data.columns.instruction names a "
            "column of them; leave one of the two out."
        )
    question = {role for role in asked if role != "output"}
    if "output" in asked and question:
        return Columns(**asked)
    history, _ = find_history(source, table)
    rest = [name for name in table.columns if name not in asked.values() and name != history]
    if "output" in asked:
        # Put under a name that is recognized, so that only the question is guessed.
        rows = [{n: row.get(n) for n in rest} | {"output": ""} for row in table.rows[:LOOKED_AT]]
        rest = [name for name in rest if plain(name) not in OUTPUT_NAMES]
        guessed = guess_columns([*rest, "output"], rows, fixed_instruction=fixed_instruction)
        reason = {role: text for role, text in guessed.reason.items() if role != "output"}
        return Columns(str(asked["output"]), guessed.instruction, guessed.input, reason)
    guessed = guess_columns(
        rest if len(rest) > 1 or history is not None else table.columns,
        table.rows[:LOOKED_AT],
        fixed_instruction=fixed_instruction,
    )
    if guessed.by_content and not by_content:
        raise DataError(
            f"{source.path} has the columns {listed(table.columns)}, and none is named like an "
            f"answer; state data.columns.output, which may be {guessed.output}."
        )
    if question:
        reason = {"output": guessed.reason["output"]}
        return Columns(guessed.output, asked.get("instruction"), asked.get("input"), reason)
    return guessed


def plain(name: str) -> str:
    """A column's name as it is compared."""
    return "".join(character for character in name.casefold() if character.isalnum())


def texts_of(names: Sequence[str], rows: Sequence[Cells]) -> dict[str, float]:
    """Mean length of the columns that hold text."""
    lengths = {}
    for name in names:
        cells = [row.get(name) for row in rows[:LOOKED_AT]]
        texts = [cell for cell in cells if isinstance(cell, str)]
        if texts and len(texts) == sum(cell is not None for cell in cells):
            lengths[name] = sum(map(len, texts)) / len(texts)
    return lengths


def _longest(
    names: Sequence[str], rows: Sequence[Cells], taken: Sequence[str | None]
) -> str | None:
    lengths = {name: n for name, n in texts_of(names, rows).items() if name not in taken}
    return max(lengths, key=lambda name: lengths[name]) if lengths else None


def _conversation(names: Sequence[str]) -> str | None:
    return next((name for name in names if plain(name) in CONVERSATION_NAMES), None)


def _no_columns(names: Sequence[str]) -> str:
    conversation = _conversation(names)
    if conversation is not None:
        return (
            f"the column {conversation} holds no messages with a role and a content (or from and "
            "value); make rows of it with data.jinja, or give a column for the question and one "
            "for the answer."
        )
    return (
        f"a row needs a column for the question and one for the answer, and the columns are "
        f"{listed(names)}; name them in data.columns."
    )


def nearest(column: str, names: Sequence[str]) -> str:
    """The column that may have been meant, in brackets."""
    by_name = {plain(name): name for name in names}
    near = difflib.get_close_matches(plain(column), list(by_name), n=1, cutoff=0.6)
    return f" (did you mean {by_name[near[0]]}?)" if near else ""


def listed(names: Sequence[str]) -> str:
    """The first dozen names, in one line."""
    shown = [name if len(name) <= 40 else name[:39] + "…" for name in names[:12]]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(shown) + more
