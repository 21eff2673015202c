"""A document as Markdown (CommonMark with GitHub's tables), every text of it escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable

from halfbyte.report.blocks import (
    Answers,
    Bars,
    Block,
    Code,
    Document,
    Facts,
    Finding,
    Findings,
    Heading,
    Items,
    Paragraph,
    Picture,
    Sample,
    Section,
    Shown,
    Table,
    Tiles,
    Verbatim,
)
from halfbyte.report.text import clean

# What begins markup anywhere in a line, and what does so only at its beginning.
_ACTIVE = re.compile(r"([\\`*_\[\]<>|~$&])")
_LEADING = re.compile(r"^(?:([-+#=])|(\d+)(?=[.)](?:\s|$)))")


def to_markdown(document: Document) -> str:
    """The whole document; its plots are ``plots/NAME.png``."""
    lines = [f"# {escape(document.title)}", ""]
    line = [document.kicker, *document.facts, document.state]
    lines += [escape(" · ".join(part for part in line if part)), ""]
    lines += ["**Objective.** " + escape(document.objective), ""]
    for section in document.page_one:
        lines += _section(section, 2)
    for number, section in enumerate(document.sections, 1):
        lines += _section(section, 2, f"{number}. ")
    for letter, section in zip("ABCDEFGHIJ", document.appendices, strict=False):
        lines += _section(section, 2, f"Appendix {letter}: ")
    return "\n".join(lines).rstrip() + "\n"


def escape(text: str) -> str:
    """``text`` on one line so that it reads as it is and marks up nothing."""
    line = _ACTIVE.sub(r"\\\1", " ".join(clean(text).split()))
    return _LEADING.sub(_escape_leading, line)


def code(text: str) -> str:
    """A code span whatever ``text`` holds, fit for a table's cell."""
    line = " ".join(clean(text).split()) or " "
    fence = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}".replace("|", "\\|")


def fenced(text: str) -> list[str]:
    """A fenced block that ``text`` cannot end."""
    text = clean(text)
    fence = "`" * max(3, _longest_run(text) + 1)
    return [f"{fence}text", *text.split("\n"), fence, ""]


def _escape_leading(match: re.Match[str]) -> str:
    mark, number = match.groups()
    return f"\\{mark}" if mark else f"{number}\\"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _section(section: Section, level: int, before: str = "") -> list[str]:
    lines = [f"{'#' * level} {before}{escape(section.title)}", ""]
    for block in section.blocks:
        lines += _block(block, level + 1)
    return lines


def _block(block: Block, level: int) -> list[str]:
    match block:
        case Heading(text):
            return [f"{'#' * level} {escape(text)}", ""]
        case Paragraph(text):
            return [escape(text), ""]
        case Items(texts, numbered):
            marks = [f"{i}." if numbered else "-" for i in range(1, len(texts) + 1)]
            return [*(f"{m} {escape(t)}" for m, t in zip(marks, texts, strict=True)), ""]
        case Verbatim(text):
            return fenced(text)
        case Table(columns, rows, align, caption):
            return [*_table(columns, rows, align), *_caption(caption)]
        case Facts(pairs):
            return _table(["", ""], pairs, "ll")
        case Tiles(tiles):
            return _table(["", "", ""], tiles, "lrl")
        case Bars(columns, bars, caption):
            rows = [(b.label, b.figure, b.note) for b in bars]
            return [*_table(columns, rows, "lrr"), *_caption(caption)]
        case Answers(answers):
            return [line for answer in answers for line in _answer(answer, level)]
        case Sample(segments, caption):
            return _sample(segments, caption)
        case Findings(findings):
            return [line for finding in findings for line in _finding(finding)] + [""]
        case Picture(name, alt, caption):
            return [f"![{escape(alt)}](plots/{name}.png)", "", *_caption(caption)]
        case _:
            raise TypeError(f"no Markdown for {type(block).__name__}")


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]], align: str) -> list[str]:
    return [
        f"| {' | '.join(_cell(c) for c in columns)} |",
        f"| {' | '.join('---:' if a == 'r' else '---' for a in align)} |",
        *(f"| {' | '.join(_cell(c) for c in row)} |" for row in rows),
        "",
    ]


def _cell(text: str) -> str:
    return code(text) if isinstance(text, Code) else escape(text)


def _caption(text: str) -> list[str]:
    return [escape(text), ""] if text else []


def _answer(answer: Shown, level: int) -> list[str]:
    lines = [f"{'#' * level} {escape(answer.title)}", ""]
    for name, text in (
        ("Prompt", answer.prompt),
        ("Before (base in 4 bits)", answer.before),
        ("After (adapter)", answer.after),
        ("Reference", answer.reference),
    ):
        lines += [f"{name}:", "", *fenced(text)]
    return lines


def _finding(finding: Finding) -> list[str]:
    said = [f"**{finding.severity}** {code(finding.name)}: {escape(finding.text)}"]
    said += [escape(finding.todo)]
    if finding.where:
        shown = "; ".join(code(example) for example in finding.examples)
        said.append(escape(finding.where) + (f": {shown}" if shown else "") + ".")
    return [f"- {' '.join(said)}"]


def _sample(segments: Iterable[tuple[str, bool]], caption: str) -> list[str]:
    lines = _caption(caption)
    for text, carries in segments:
        lines += ["With loss:" if carries else "Without loss:", "", *fenced(text)]
    return lines
