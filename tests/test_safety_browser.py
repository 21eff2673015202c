"""In a real browser: whatever rows and models hold, no page of ours runs or fetches any of it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
from markdown_it import MarkdownIt

import test_report_safety
from halfbyte.report import make_report
from halfbyte.report.pdf import PROGRAMS
from halfbyte.run.loss_table import Losses, table_html
from halfbyte.run.notebook import report_html
from page_reader import read_page
from safety_case import RECIPE, halfbyte

PICTURES = True  # are looked at here

RAN = "CANARY-RAN"
# Each would change the title, or ask the server for something; @ is its address.
PAYLOADS = [
    "<script>document.title='CANARY-RAN'</script>",
    "<img src=x onerror=\"document.title='CANARY-RAN'\">",
    "<svg onload=\"document.title='CANARY-RAN'\"></svg>",
    "<svg><script>document.title='CANARY-RAN'</script></svg>",
    "<details open ontoggle=\"document.title='CANARY-RAN'\"><summary>a</summary></details>",
    "<input autofocus onfocus=\"document.title='CANARY-RAN'\">",
    "<iframe srcdoc=\"<script>parent.document.title='CANARY-RAN'</script>\"></iframe>",
    "<style>@keyframes k{}p{animation:k}</style>"
    "<p onanimationstart=\"document.title='CANARY-RAN'\">",
    "</title><script>document.title='CANARY-RAN'</script>",
    "</style><script>document.title='CANARY-RAN'</script>",
    "</script></textarea></noscript></template>--><script>document.title='CANARY-RAN'</script>",
    "\"><script>document.title='CANARY-RAN'</script>",
    "'><script>document.title='CANARY-RAN'</script>",
    "]]><script>document.title='CANARY-RAN'</script>",
    '" autofocus tabindex=0 onfocus="document.title=\'CANARY-RAN\'" x="',
    "[a](javascript:document.title='CANARY-RAN') <javascript:document.title='CANARY-RAN'>",
    "<a href=\"javascript:document.title='CANARY-RAN'\" autofocus>a</a>",
    "<img src=@/img> ![a](@/markdown) <img srcset=@/srcset>",
    "<link rel=stylesheet href=@/link> <style>@import url(@/import);</style>",
    '<div style="background:url(@/background)">a</div> <table background=@/table><tr><td>',
    "<iframe src=@/frame></iframe><object data=@/object></object><embed src=@/embed>",
    "<meta http-equiv=refresh content='0;url=@/refresh'><base href=@/base/>",
    "<svg><image href=@/image /><use href=@/use#a /></svg><video src=@/video poster=@/poster>",
    "<form action=@/form id=f><input name=a></form><script>f.submit()</script>",
    "{{ 7*7 }} {% raw %} ${document.title} <%= 7*7 %> #{7*7}",
    "[b]: @/reference\n\n<!-- <b> -->\n<b>bold</b>\n\n# a\n\n| a |\n| - |\n",
]


class Seen(NamedTuple):
    title: str
    dom: str
    asked: list[str]  # of the server


class Browser:
    def __init__(self, program: str, folder: Path) -> None:
        self._program, self._folder, self._asked = program, folder, list[str]()
        asked = self._asked

        class Answers(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"<script>document.title='CANARY-RAN'</script>")

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self.text = "\n".join(PAYLOADS).replace("@/", f"{self.address}/")

    def look(self, page: Path | str) -> Seen:
        """What becomes of a page, a file or its text, in two seconds of its own time."""
        if isinstance(page, str):
            text, page = page, self._folder / "page.html"
            page.write_text(text, encoding="utf-8")
        self._asked.clear()
        command = [
            *(self._program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={self._folder}/profile", "--virtual-time-budget=2000"),
            *("--dump-dom", page.resolve().as_uri()),
        ]
        done = subprocess.run(command, capture_output=True, timeout=120, check=True)
        dom = done.stdout.decode("utf-8", "replace")
        found = re.search("<title>(.*?)</title>", dom, re.DOTALL)
        title = html.unescape(found[1]) if found else ""
        return Seen(title, dom, [path for path in self._asked if "favicon" not in path])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no Chromium: none of {', '.join(PROGRAMS)} is in PATH")
    opened = Browser(program, tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


def nothing_happens(seen: Seen) -> None:
    assert seen.title != RAN
    assert seen.asked == []


def without_policy(page: Path) -> str:
    """The page without its policy, so that escaping alone is left."""
    text = page.read_text(encoding="utf-8")
    policy = re.search('<meta http-equiv="Content-Security-Policy"[^>]*>', text)
    assert policy is not None
    return text.replace(policy[0], "")


def test_the_payloads_go_off(browser: Browser) -> None:
    """As they are in a page: else the tests below would see nothing whatever happened."""
    scripts = browser.look(f"<html><title>a</title><body>{PAYLOADS[0]}</body></html>")
    assert scripts.title == RAN
    for payload in (PAYLOADS[1], PAYLOADS[2], PAYLOADS[6]):
        assert browser.look(f"<title>a</title><body>{payload}</body>").title == RAN, payload
    loads = "\n".join(p for p in PAYLOADS if "@/" in p and "refresh" not in p and "form" not in p)
    asked = browser.look(f"<title>a</title>{loads}".replace("@/", f"{browser.address}/")).asked
    assert {"/img", "/link", "/import", "/background", "/frame", "/image"} <= set(asked)


def test_the_policy_is_a_second_line(browser: Browser, tmp_path: Path) -> None:
    """Even where something were not escaped, in the body of a page with our policy."""
    page = make_report(test_report_safety.write_run(tmp_path)).html
    text = page.read_text(encoding="utf-8")
    payloads = "\n".join(p for p in PAYLOADS if "refresh" not in p)
    raw = text.replace("<main>", "<main>" + payloads.replace("@/", f"{browser.address}/"), 1)
    assert raw != text
    nothing_happens(browser.look(raw))


def test_a_report_of_a_nasty_run(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In HTML with and without the policy, in a notebook's frame, and in Markdown by a library."""
    monkeypatch.setattr(test_report_safety, "NASTY", browser.text)
    folder = test_report_safety.nasty_run(tmp_path / "run")
    files = make_report(folder)
    for page in (files.html, without_policy(files.html)):
        seen = browser.look(page)
        nothing_happens(seen)
        assert " ".join(browser.text.split())[:60] in " ".join(seen.title.split())
        (tmp_path / "dom.html").write_text(seen.dom, encoding="utf-8")
        tags = read_page(tmp_path / "dom.html").tags
        kinds = {tag for tag, _ in tags}
        assert not kinds & {"script", "iframe", "object", "embed", "link", "form", "input", "img"}
        assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    nothing_happens(browser.look(f"<title>a</title><body>{report_html(folder)}</body>"))
    nothing_happens(browser.look(f"<title>a</title><body>{_frame_that_may(folder)}</body>"))
    markdown = files.markdown.read_text(encoding="utf-8")
    for parser in (
        MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]),
        MarkdownIt("gfm-like", {"html": True, "linkify": False}),
    ):
        rendered = parser.render(markdown)
        # The plots are the report's own pictures, of files beside it.
        assert set(re.findall(r"<img src=\"([^\"]*)\"", rendered)) <= {
            f"plots/{name}.png" for name in ("loss", "learning_rate", "speed")
        }
        nothing_happens(browser.look(f"<title>a</title><body>{rendered}</body>"))


def _frame_that_may(folder: Path) -> str:
    """The notebook's frame as if it were allowed to run scripts."""
    frame = report_html(folder)
    assert " sandbox " in frame
    return frame.replace(" sandbox ", ' sandbox="allow-scripts allow-same-origin" ')


def test_a_page_of_rows(
    browser: Browser,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
    tiny_rows: Path,
) -> None:
    """``halfbyte data --html``: names of files and columns, cells, and what the audit says."""
    shutil.copytree(tiny_model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    name = "rows <img src=x onerror=document.title='CANARY-RAN'>.jsonl"
    column = "<script>document.title='CANARY-RAN'<\\script>"
    rows = [
        {column: browser.text + str(n), "answer": browser.text * (n % 2) + f"It is {n}."}
        for n in range(24)
    ]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("recipe.yaml").write_text(
        RECIPE.replace("rows.jsonl", json.dumps(name)).replace("length: 128", "length: 20000")
    )
    columns = json.dumps({"instruction": column, "output": "answer"})
    ended = halfbyte(
        "data", "recipe.yaml", "--html", "page.html", "--set", f"data.columns={columns}"
    )
    assert ended.code in (0, 1), ended
    page = Path("page.html")
    for looked in (page, without_policy(page)):
        seen = browser.look(looked)
        nothing_happens(seen)
        assert "CANARY-RAN" in seen.dom
        assert "<script" not in seen.dom


def test_the_table_of_a_notebook(browser: Browser) -> None:
    losses = Losses(logging_steps=1)
    losses.notes.append(browser.text)
    losses.status = browser.text
    text = table_html(losses)
    assert "CANARY-RAN" in text
    nothing_happens(browser.look(f"<title>a</title><body>{text}</body>"))
