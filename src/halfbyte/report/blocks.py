"""What a document is made of, before it is Markdown or HTML.

All text here is plain: it holds no markup, and what looks like markup is data that the renderers
escape. A ``Code`` is text to be shown letter by letter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar


class Code(str):
    """Text that a program reads: a path, a key, a digest."""

    __slots__ = ()


@dataclass(frozen=True)
class Block:
    """Base of all blocks; ``kind`` is the name of its macro in the HTML template."""

    kind: ClassVar[str] = ""


@dataclass(frozen=True)
class Heading(Block):
    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Paragraph(Block):
    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Items(Block):
    """A list; its order matters if ``numbered``."""

    kind: ClassVar[str] = "items"
    texts: Sequence[str]
    numbered: bool = False


@dataclass(frozen=True)
class Verbatim(Block):
    """Text with its line breaks."""

    kind: ClassVar[str] = "verbatim"
    text: str


@dataclass(frozen=True)
class Table(Block):
    """``align`` has a letter for each column: ``l`` for text, ``r`` for numbers."""

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str
    caption: str = ""
    total: bool = False  # the last row sums up the others


@dataclass(frozen=True)
class Facts(Block):
    """Names and values."""

    kind: ClassVar[str] = "facts"
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Tiles(Block):
    """Few figures to be seen at a glance: name, figure, note."""

    kind: ClassVar[str] = "tiles"
    tiles: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Bar:
    """One bar: ``share`` of the longest, from 0 to 1; None where nothing was measured."""

    label: str
    figure: str
    note: str
    share: float | None
    strong: bool = False


@dataclass(frozen=True)
class Bars(Block):
    kind: ClassVar[str] = "bars"
    columns: tuple[str, str, str]
    bars: Sequence[Bar]
    caption: str


@dataclass(frozen=True)
class Shown:
    """A prompt and what was answered, perhaps cut."""

    title: str
    prompt: str
    before: str
    after: str
    reference: str


@dataclass(frozen=True)
class Answers(Block):
    kind: ClassVar[str] = "answers"
    answers: Sequence[Shown]


@dataclass(frozen=True)
class Sample(Block):
    """One row as trained: runs of tokens and whether they carry loss."""

    kind: ClassVar[str] = "sample"
    segments: Sequence[tuple[str, bool]]
    caption: str


@dataclass(frozen=True)
class Legend(Block):
    """What tells tokens that carry loss from those that do not."""

    kind: ClassVar[str] = "legend"


@dataclass(frozen=True)
class Token:
    """One token; ``text`` is empty where it has no character of its own."""

    id: int
    text: str
    learned: bool


@dataclass(frozen=True)
class Tokens(Block):
    """One row token by token; ``left_out`` of its tokens lie between ``head`` and ``tail``."""

    kind: ClassVar[str] = "tokens"
    title: str
    note: str
    head: Sequence[Token]
    left_out: int
    tail: Sequence[Token]


@dataclass(frozen=True)
class Finding:
    """Something that an audit found: ``severity`` is error, accepted, warning or note."""

    severity: str
    name: str
    text: str
    todo: str
    where: str
    examples: Sequence[str]


@dataclass(frozen=True)
class Findings(Block):
    kind: ClassVar[str] = "findings"
    findings: Sequence[Finding]


@dataclass(frozen=True)
class Picture(Block):
    """A plot by its name; ``alt`` says in words what it shows."""

    kind: ClassVar[str] = "picture"
    name: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Section:
    title: str
    anchor: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """A report: page one, sections and appendices in their order."""

    title: str
    kicker: str  # what kind of document it is
    facts: Sequence[str]  # author, date, run: the line below the title
    state: str  # "finished", or what it is instead
    objective: str
    page_one: Sequence[Section]
    sections: Sequence[Section]
    appendices: Sequence[Section] = field(default_factory=list)
    contents: bool = True  # whether a table of contents precedes the sections
    good: bool = False  # whether a state other than "finished" is as it should be
