"""The filters of ``data.cleaning``: which rows are dropped or mended before anything else.

A recipe lists them, each with its name under ``filter`` and its settings beside it; they are
applied in the order of the list. What they do is in ``halfbyte.data.cleaning``.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from halfbyte.recipe.section import Section

Part = Literal["question", "answer", "row"]
Bound = Annotated[int, Field(ge=0)] | None

# The scripts that living languages are written in; Unicode has more, which count as others.
Script = Literal[
    "Latin",
    "Greek",
    "Cyrillic",
    "Armenian",
    "Georgian",
    "Hebrew",
    "Arabic",
    "Syriac",
    "Thaana",
    "NKo",
    "Ethiopic",
    "Tifinagh",
    "Cherokee",
    "Devanagari",
    "Bengali",
    "Gurmukhi",
    "Gujarati",
    "Oriya",
    "Tamil",
    "Telugu",
    "Kannada",
    "Malayalam",
    "Sinhala",
    "Thai",
    "Lao",
    "Tibetan",
    "Myanmar",
    "Khmer",
    "Mongolian",
    "Han",
    "Hiragana",
    "Katakana",
    "Bopomofo",
    "Hangul",
    "Yi",
    "Javanese",
    "Balinese",
]


def wrong_setting(name: str, sentence: str) -> PydanticCustomError:
    """What is wrong with the setting ``name`` of a filter, to follow where it stands."""
    return PydanticCustomError("item", "{sentence}", {"name": name, "sentence": sentence})


class Filter(Section):
    """One entry of ``data.cleaning``."""

    filter: str

    @property
    def words(self) -> str:
        """Its settings that are not the defaults: ``by question, threshold 0.9``."""
        stated = self.model_dump(exclude={"filter"}, exclude_defaults=True)
        return ", ".join(f"{name} {_shown(value)}" for name, value in stated.items())

    def __str__(self) -> str:
        return f"{self.filter} ({self.words})" if self.words else self.filter


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


class ExactDuplicates(Filter):
    """Drops a row that is the same as an earlier one."""

    filter: Literal["exact_duplicates"]
    by: Part = Field(
        default="row",
        description="What must be the same: the whole `row`, its `question` (all that stands "
        "before the last answer) or its last `answer`.",
    )
    normalize: bool = Field(
        default=False,
        description="Also take for the same what differs in case, white space, quotes and the "
        "punctuation of sentences alone.",
    )


class NearDuplicates(Filter):
    """Drops a row that is nearly the same as an earlier one; needs `halfbyte[clean]`.

    Two rows are compared if their system messages are the same, and their instructions where an
    input follows; these are then left out, since they would make all rows alike. Case, white space,
    quotes and the punctuation of sentences are passed over.
    """

    filter: Literal["near_duplicates"]
    by: Part = Field(default="row", description="What is compared: `row`, `question` or `answer`.")
    threshold: Annotated[float, Field(ge=0.5, le=1)] = Field(
        default=0.85,
        description="Dropped from this similarity on: of the word sequences that two rows have, "
        "the share that both have (Jaccard). In a row of 100 words one that is changed leaves "
        "0.94, five leave 0.73.",
    )
    ngram: Annotated[int, Field(ge=1, le=20)] = Field(
        default=3,
        description="Words in a sequence; fewer find rows whose words were moved about, more ask "
        "for longer stretches alike.",
    )


class Length(Filter):
    """Drops a row whose question or last answer is too short or too long.

    Words stand between white space; of Chinese and Japanese each character counts as one. A
    question is all that stands before the last answer. An answer that only calls a tool has no
    length.
    """

    filter: Literal["length"]
    question_min_words: Bound = Field(default=None, description="Fewest words of a question.")
    question_max_words: Bound = Field(default=None, description="Most words of a question.")
    answer_min_words: Bound = Field(default=None, description="Fewest words of an answer.")
    answer_max_words: Bound = Field(default=None, description="Most words of an answer.")
    question_min_characters: Bound = Field(
        default=None, description="Fewest characters of a question."
    )
    question_max_characters: Bound = Field(
        default=None, description="Most characters of a question."
    )
    answer_min_characters: Bound = Field(
        default=None, description="Fewest characters of an answer."
    )
    answer_max_characters: Bound = Field(default=None, description="Most characters of an answer.")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        bounds = self.model_dump(exclude={"filter"})
        if all(value is None for value in bounds.values()):
            raise wrong_setting("", "needs at least one bound, such as `answer_min_words: 5`.")
        for name, most in bounds.items():
            least = bounds.get(name.replace("_max_", "_min_"))
            if most is not None and least is not None and least > most:
                raise wrong_setting(
                    name, f"is {most:,}, below the least, which is {least:,}; no row fits both."
                )
        return self


class Pattern(Filter):
    """Drops rows with a text that a regular expression finds, or replaces that text."""

    filter: Literal["pattern"]
    field: Part = Field(
        default="answer",
        description="Where it is looked for: in what the assistant says (`answer`), in everything "
        "else (`question`), or in all of the `row`; each message for itself.",
    )
    drop: str | None = Field(
        default=None,
        description="Rows in which this regular expression (Python's `re`) finds something are "
        "dropped. `(?i)` at its start ignores case.",
    )
    replace: str | None = Field(
        default=None, description="What this regular expression finds is replaced instead."
    )
    replacement: str = Field(
        default="",
        description="What is put there; `\\1` stands for the first group. Empty removes it.",
    )

    @field_validator("drop", "replace")
    @classmethod
    def _is_expression(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise wrong_setting("", f"is not a regular expression: {error}.") from None
        return pattern

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.drop is None) == (self.replace is None):
            raise wrong_setting(
                "", "needs one of drop and replace" + (", not both." if self.drop else ".")
            )
        if self.drop is not None and self.replacement:
            raise wrong_setting("replacement", "stands beside drop; it belongs to replace.")
        try:
            re.compile(self.replace or "").sub(self.replacement, "")
        except (re.error, IndexError, RecursionError, OverflowError) as error:
            raise wrong_setting("replacement", f"does not fit its pattern: {error}.") from None
        return self


class Unfinished(Filter):
    """Drops a row with an answer that breaks off, or that begins in the middle.

    An answer breaks off where it ends in a comma, a colon, a dash or an opened bracket, in a code
    block that is not closed, or in a word with no mark of a sentence's end after it. Lists, code,
    verse, tables and single phrases need no such mark.
    """

    filter: Literal["unfinished"]
    start: Literal["auto", "any", "upper"] = Field(
        default="auto",
        description="Whether an answer that begins with a small letter begins in the middle: yes "
        "with `upper`, no with `any`; `auto` says yes where nine in ten of the answers begin with "
        "a capital.",
    )
    sign_off_words: Annotated[int, Field(ge=0)] = Field(
        default=3,
        description="So many last words that follow a finished sentence and begin with a capital "
        "are a farewell or a name (`Best wishes`) and not an answer that breaks off.",
    )


class ScriptFilter(Filter):
    """Drops a row that is written in other scripts."""

    filter: Literal["script"]
    allow: Annotated[list[Script], Field(min_length=1)] = Field(
        description="The scripts to keep, by their Unicode names: `[Latin]`, or `[Han, Hiragana, "
        "Katakana]` for Japanese."
    )
    field: Part = Field(
        default="row",
        description="What is looked at; of a `row` the question and the answer, each for itself.",
    )
    min_share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.9,
        description="Dropped where fewer of the letters than this share are of these scripts; one "
        "or two letters of others, as in a formula, never count.",
    )


class LanguageFilter(Filter):
    """Drops a row in another language; needs `halfbyte[clean]`."""

    filter: Literal["language"]
    allow: Annotated[list[str], Field(min_length=1)] = Field(
        description="The languages to keep, as ISO 639 codes: `[en]`, `[de, fr]`."
    )
    field: Part = Field(
        default="answer",
        description="What is looked at; of a `row` the question and the answer, each for itself.",
    )
    min_letters: Annotated[int, Field(ge=1)] = Field(
        default=40,
        description="Texts of fewer letters are kept: their language cannot be told.",
    )

    @field_validator("allow")
    @classmethod
    def _are_codes(cls, names: list[str]) -> list[str]:
        for name in names:
            if not re.fullmatch("[a-z]{2,3}", name):
                raise wrong_setting("", f"has {name!r}, which is no ISO 639 code such as en or pt.")
        return names


class EncodingFilter(Filter):
    """Drops a row whose characters were damaged when it was stored.

    That is U+FFFD in the place of a character, UTF-8 read as Windows-1252 or Latin-1 (`â€™` for an
    apostrophe), control characters, and half a surrogate pair.
    """

    filter: Literal["encoding"]
    field: Part = Field(default="row", description="What is looked at; each message for itself.")
    repair: bool = Field(
        default=False,
        description="Mend what can be mended, by `ftfy`, and drop the rest; needs "
        "`halfbyte[clean]`.",
    )


class OverlapWithHeldOut(Filter):
    """Drops a row that would train and also stands among the held-out rows.

    The held-out rows stay as they are. What differs in case, white space, quotes and the
    punctuation of sentences alone is the same. It is applied last, whatever its place in the list,
    since rows are held out of those that the other filters leave.
    """

    filter: Literal["overlap_with_held_out"]
    by: Part = Field(
        default="question", description="What must be the same: `question`, `answer` or `row`."
    )


AnyFilter = Annotated[
    ExactDuplicates
    | NearDuplicates
    | Length
    | Pattern
    | Unfinished
    | ScriptFilter
    | LanguageFilter
    | EncodingFilter
    | OverlapWithHeldOut,
    Field(discriminator="filter"),
]
