"""Whatever rows, models and recipes hold, the report shows it and does nothing else with it."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

import run_records
from halfbyte.errors import RunError
from halfbyte.report import make_report
from halfbyte.report.markdown import code, escape, fenced
from halfbyte.report.pdf import PROGRAMS
from page_reader import read_page
from run_records import write_run

PICTURES = True  # are looked at here

NASTY = (
    "</pre></td></table><script>alert(1)</script><img src=x onerror=alert(2)> "
    "<style>@import url(http://evil.example/a.css)</style> & &amp; &lt;b&gt; "
    "| a | b | ``` ```` ~~~ `x` **bold** _it_ [link](javascript:alert(3)) ![i](http://evil.test) "
    "$x$ {{ 7*7 }} {% raw %} \\ \\| <!-- --> ]]> \"quoted\" 'single'\n"
    "# no heading\n- no item\n1. no item\n> no quote\n\n---\n===\n| x |\n| --- |\n"
    "```\nno fence\n```\n<b>bold</b> \u202eright to left\u202c \U0001f600 日本"
)


def nasty_run(folder: Path) -> Path:
    answers = [(row, NASTY, NASTY, NASTY, NASTY) for row in (1, 2, 3)]
    quoted = "'" + " ".join(NASTY.split()).replace("'", "''") + "'"
    recipe = re.sub(r"title: .*", lambda _: f"title: {quoted}", run_records.EFFECTIVE)
    recipe = re.sub(r"author: .*", lambda _: f"author: {quoted}", recipe)
    events: dict[str, dict[str, Any]] = {
        "audit": {
            "source": NASTY,
            "sample": [(NASTY, False), (NASTY, True)],
            "rows_dropped": {NASTY: 1},
            "columns": {"instruction": NASTY},
        },
        "model": {"name": NASTY, "licence": NASTY, "lora_modules": {NASTY: 2}},
        "warning": {"text": NASTY},
        "fallback": {"what": NASTY, "reason": NASTY},
        "choice": {"reason": NASTY, "asked": NASTY},
        "technique": {"text": NASTY},
        "environment": {"cpu": NASTY, "packages": {NASTY: NASTY}},
        "phase": {"name": NASTY},
        "artifact": {"path": NASTY},
        "check": {"name": NASTY, "detail": NASTY},
        "run_started": {"command": [NASTY], "folder": NASTY},
        "checkpoint": {"path": NASTY},
    }
    return write_run(folder, answers=answers, effective=recipe, events=events)


def test_html_of_a_nasty_run(tmp_path: Path) -> None:
    """The tags are those of a tame run of the same shape, and the data is read back whole."""
    page = read_page(make_report(nasty_run(tmp_path / "nasty")).html)
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "img", "iframe", "object", "embed", "link", "form"} & set(tags)
    assert tags.count("b") == 1  # the word Objective
    assert tags.count("style") == 1
    svgs = tags.count("svg")
    assert svgs == 3
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert (value or "").startswith("#"), (tag, name, value)
            if name == "style":
                assert "url(" not in (value or "").replace("url(#", "")
    shown = page.text
    assert NASTY.replace("\r", "") in shown  # with its line breaks, in answers and the sample
    assert " ".join(NASTY.split()) in page.headings["h1"][0]
    assert "49 }}" not in shown


def test_page_allows_no_script_and_no_load(tmp_path: Path) -> None:
    page = read_page(make_report(write_run(tmp_path)).html)
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    rules = dict(rule.strip().split(" ", 1) for rule in (policy or "").split(";"))
    assert rules == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    refs = {(a.get("href") or a.get("xlink:href") or "#")[1:] for _, a in page.tags} - {""}
    refs |= set(re.findall(r"url\(#([^)]+)\)", (tmp_path / "report.html").read_text()))
    assert refs <= set(ids)
    pictures = [a for t, a in page.tags if t == "svg"]
    assert all(len(a["aria-label"] or "") > 60 and a["role"] == "img" for a in pictures)
    css = (tmp_path / "report.html").read_text().split("<style>")[1].split("</style>")[0]
    assert not re.search(r"http|@import|url\(", css)


def test_sample_marks_tokens_that_carry_loss(tmp_path: Path) -> None:
    html = make_report(write_run(tmp_path)).html.read_text()
    pre = re.search(r"<pre dir=\"auto\">(.*?)</pre>", html, re.DOTALL)
    assert pre is not None
    spans = re.findall(r'<span class="(loss|no-loss)">(.*?)</span>', pre.group(1), re.DOTALL)
    assert [name == "loss" for name, _ in spans] == [c for _, c in run_records.SAMPLE]
    assert "&lt;|im_end|&gt;" in spans[2][1]


def test_markdown_of_a_nasty_run(tmp_path: Path) -> None:
    """A parser that lets HTML through finds none, and as many blocks as in a tame run."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tame = make_report(
        write_run(tmp_path / "tame", answers=[(n, "p", "b", "a", "r") for n in (1, 2, 3)])
    )
    files = make_report(nasty_run(tmp_path / "nasty"))
    kinds = {}
    for name, path in (("tame", tame.markdown), ("nasty", files.markdown)):
        tokens = parser.parse(path.read_text(encoding="utf-8"))
        flat = [*tokens, *(child for token in tokens for child in token.children or [])]
        kinds[name] = [t.type for t in flat]
    for kind in ("html_block", "html_inline", "link_open", "hr", "blockquote_open", "s_open"):
        assert kind not in kinds["nasty"], kind
    assert kinds["nasty"].count("em_open") == 0
    assert kinds["nasty"].count("strong_open") == 1  # the word Objective
    for kind in ("table_open", "bullet_list_open", "ordered_list_open", "image"):
        assert kinds["nasty"].count(kind) == kinds["tame"].count(kind), kind
    fences = [t.content for t in parser.parse(files.markdown.read_text()) if t.type == "fence"]
    assert sum(content == NASTY + "\n" for content in fences) >= 12  # in full, 3 rows of 4


@pytest.mark.parametrize(
    "text",
    [
        NASTY,
        "1. one",
        "- one",
        "# one",
        "> one",
        "=",
        "---",
        "a|b\\|c",
        "`",
        "`` ` ``",
        "\\`",
        "&copy; &#35;",
        "3.50 %",
        "a\\",
    ],
)
def test_escaped_text_reads_as_it_was(text: str) -> None:
    """In a paragraph, in a table's cell, as code in a cell, and in a fence."""
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")

    def plain(markdown: str) -> list[str]:
        inline = [t for t in parser.parse(markdown) if t.type == "inline"]
        assert all(
            child.type in ("text", "text_special", "code_inline")
            for token in inline
            for child in token.children or []
        )
        return ["".join(c.content for c in t.children or []) for t in inline]

    line = " ".join(text.split())
    assert plain(escape(text)) == [line]
    table = f"| a | b |\n| --- | --- |\n| {escape(text)} | {code(text)} |\n"
    assert plain(table)[2:] == [line, line]
    fence = [t for t in parser.parse("\n".join(fenced(text))) if t.type == "fence"]
    assert [t.content for t in fence] == [text + "\n"]
    assert escape("3.50 %") == "3.50 %"  # and no more is escaped than must be


def test_what_cannot_be_shown_is_shown_as_such(tmp_path: Path) -> None:
    """Control characters, and half a surrogate pair, which UTF-8 refuses."""
    bad = "a\x00b\x1b[31mc\ud800d\x7fe\r\nf"
    answers = [(1, bad, bad, bad, bad)]
    files = make_report(write_run(tmp_path, answers=answers, events={"warning": {"text": bad}}))
    for path in (files.html, files.markdown):
        text = path.read_text(encoding="utf-8")
        assert "a␀b␛" in text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", text)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_report(write_run(tmp_path, done=0, end="cut"))
    before = files.html.read_bytes()
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"kind": "warning", "time": 1.0, "text": "late"}\n')
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == "report.html":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match=r"report\.html cannot be written \(No space left"):
        make_report(tmp_path)
    assert files.html.read_bytes() == before
    assert not list(tmp_path.rglob("*.partial"))


def test_pdf_without_chromium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="--pdf needs Chromium"):
        make_report(write_run(tmp_path / "run"), pdf=True)
    assert (tmp_path / "run" / "report.html").exists()
    assert not (tmp_path / "run" / "report.pdf").exists()


@pytest.mark.parametrize("program", PROGRAMS)
def test_pdf_by_whichever_program_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    """A stand-in that prints the address of the page it was given, or fails."""
    stand_in = tmp_path / program
    stand_in.write_text(
        "#!/bin/sh\n"
        'for a in "$@"; do\n'
        "case $a in --print-to-pdf=*) out=${a#*=};; file:*) page=$a;; esac\n"
        "done\n"
        'echo "%PDF of $page" > "$out"\n'
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("halfbyte.report.pdf.PROGRAMS", (program,))
    folder = write_run(tmp_path / "a run", done=0, end="cut")
    files = make_report(folder, pdf=True)
    assert files.pdf is not None
    page = (folder / "report.html").as_uri()
    assert files.pdf.read_text() == f"%PDF of {page}\n"
    stand_in.write_text("#!/bin/sh\necho no display >&2\nexit 3\n")
    with pytest.raises(RunError, match=r"exit code 3: no display"):
        make_report(folder, pdf=True)
    assert files.pdf.read_text() == f"%PDF of {page}\n"
