"""An HTML page as a strict reader sees it: balanced tags, tables, lists, plain text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "br", "wbr", "hr", "img", "link", "input", "col"}


@dataclass
class Page:
    text: str = ""  # no-break spaces as spaces
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    lists: list[list[str]] = field(default_factory=list)
    headings: dict[str, list[str]] = field(default_factory=dict)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page = Page()
        self.open: list[str] = []
        self.parts: list[str] = []  # text of the innermost cell, item or heading

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.page.tags.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "table":
            self.page.tables.append([])
        elif tag == "tr":
            self.page.tables[-1].append([])
        elif tag in ("ol", "ul"):
            self.page.lists.append([])
        if tag in ("td", "th", "li", "h1", "h2", "h3"):
            self.parts = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.page.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}> at {self.getpos()}"
        self.open.pop()
        text = _plain("".join(self.parts))
        if tag in ("td", "th"):
            self.page.tables[-1][-1].append(text)
        elif tag == "li":
            self.page.lists[-1].append(text)
        elif tag in ("h1", "h2", "h3"):
            self.page.headings.setdefault(tag, []).append(text)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.parts.append(data)
            self.page.text += data.replace("\u00a0", " ")


def read_page(path: Path) -> Page:
    """Read ``path``; raises AssertionError where a tag is not closed in order."""
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader.page


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
