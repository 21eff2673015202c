"""Secrets stay in the environment: no record, page, sentence or traceback repeats them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from command_line import halfbyte
from halfbyte.errors import ModelError, RecipeError
from halfbyte.events.types import Funnel, RunStarted, Step
from halfbyte.recipe.load import parse_recipe
from halfbyte.redaction import HIDDEN, redact, redact_all, remember
from halfbyte.report import make_report

# Made up, in the forms in which they are issued.
TOKEN = "hf_" + "aB3dE5gH" * 4 + "xy"
FORMS = [
    TOKEN,
    "ghp_" + "a1B2c3D4" * 5,
    "github_pat_" + "11ABCDEFG0" * 5,
    "sk-proj-" + "a1B2c3D4" * 6,
    "AKIA" + "ABCDEFGH12345678",
    "xoxb-123456789012-abcdefABCDEF",
    "wandb_v1_" + "a1B2c3D4" * 4,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijklmnop",
]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No secret of whoever runs the tests takes part."""
    for name in [n for n in os.environ if any(w in n for w in ("TOKEN", "KEY", "PASS", "SECRET"))]:
        if name != "TOKENIZERS_PARALLELISM":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.parametrize("token", FORMS)
def test_a_token_is_known_by_its_form(token: str) -> None:
    for around in ("{}", "--set data.path={}", "401 for '{}'.", '{{"token": "{}"}}', "at/{}/x"):
        assert redact(around.format(token)) == around.format(HIDDEN)


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("GET https://ann:pa@ss-word@host.org/x failed", "ss-word"),
        ("https://hooks.slack.com/services/T012/B345/abcDEF answered 404", "T012"),
        ("POST https://discord.com/api/webhooks/123/abc-DEF_", "abc-DEF_"),
        ("https://cdn.org/w.bin?X-Amz-Signature=a1b2&x=1", "a1b2"),
        ("{'Authorization': 'Basic YW5uOnBhc3M='}", "YW5uOnBhc3M"),
        ("headers: authorization: Bearer abcdefghi", "abcdefghi"),
    ],
)
def test_what_stands_in_urls_and_headers_is_hidden(text: str, secret: str) -> None:
    assert secret in text
    assert secret not in redact(text)
    assert redact(text).split()[0] == text.split()[0] or text.startswith(("{", "https"))


def test_what_is_redacted_stays_as_it_is() -> None:
    """A sentence is put together from parts that are redacted already."""
    for text in (TOKEN, "https://hooks.slack.com/services/T0/B0/x", "https://a:b@c/d?token=e"):
        once = redact(f"at {text}: it failed.")
        assert once.endswith(": it failed.")
        assert redact(once) == once


def test_ordinary_texts_stay_as_they_are() -> None:
    for text in (
        "Basic knowledge of the bearer token; a password is asked for.",
        "eos_token=<|im_end|> pad_token=<pad> https://huggingface.co/a/b?revision=main",
        "sk-learn-experiments/run-2024, task-1234567890123456789012, ann@example.org",
        "sha256 " + "0a" * 32,
        "weight_initializationstrategyuniform, sk-learn-experiments_of_last_summer",
    ):
        assert redact(text) == text


def test_values_of_the_environment_are_hidden_however_they_are_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    password = 'o"ther\\pass/word'
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    for written in (password, json.dumps(password), repr(password), "o%22ther%5Cpass%2Fword"):
        shown = redact(f"<{written}>")
        assert HIDDEN in shown
        assert "ther" not in shown
    # A variable of any name may hold a URL with a password: a proxy, a tracking server.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:geheimnis@mlflow.example.org")
    assert redact("wrong password geheimnis") == f"wrong password {HIDDEN}"
    # Switches, short values and names of files are no secrets.
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    monkeypatch.setenv("PWD", "/a/folder/that/is/gone")
    assert redact(os.environ["PWD"]) == os.environ["PWD"]
    assert redact(f"1 {tmp_path}") == f"1 {tmp_path}"


def test_what_the_hub_client_and_netrc_keep_is_hidden(tmp_path: Path) -> None:
    Path(os.environ["HF_TOKEN_PATH"]).write_text("an-old-token-without-form\n")
    Path(os.environ["NETRC"]).write_text("machine api.wandb.ai login user password 0123456789abcd")
    assert redact("an-old-token-without-form, 0123456789abcd") == f"{HIDDEN}, {HIDDEN}"


def test_a_remembered_url_is_hidden_with_its_path() -> None:
    remember("https://chat.example.org/in/9d8f7a6b5c?room=blue42")
    said = "Max retries exceeded with url: /in/9d8f7a6b5c?room=blue42 (https://chat.example.org)"
    assert redact(said) == (f"Max retries exceeded with url: {HIDDEN} (https://chat.example.org)")


def test_events_are_redacted_all_through_and_steps_not_touched() -> None:
    started = RunStarted("1", ["halfbyte", "train", "--set", f"title={TOKEN}"], f"runs/{TOKEN}")
    hidden = redact_all(started)
    assert hidden.command[-1] == f"title={HIDDEN}"
    assert TOKEN not in str(hidden)
    filters = {"name": TOKEN, "settings": "", "rows_in": 1, "dropped": 1, "changed": 0}
    shown = [{"row": 1, "text": f"my {TOKEN}"}]
    funnel = redact_all(Funnel(1, 0, [{**filters, "examples": shown}]))  # type: ignore[list-item]
    assert TOKEN not in str(funnel)
    assert funnel.filters[0].examples[0].text == f"my {HIDDEN}"
    step = Step(1, 0.1, 2.0, 1e-3, 1.0, 10, 10, 0.1, 100)
    assert redact_all(step) is step


def test_errors_say_nothing_secret() -> None:
    assert TOKEN not in str(ModelError(f"the hub refused {TOKEN}."))
    assert TOKEN not in repr(ModelError(f"the hub refused {TOKEN}."))


@pytest.mark.parametrize(
    ("text", "overrides", "place"),
    [
        (f"model: {{name: x}}\ndata:\n  path: {TOKEN}\n", [], "r.yaml, line 3: data.path"),
        ("model: {name: x}\ndata: {path: y}", [f"title={TOKEN}"], "--set title=[hidden]: title"),
        ("model: {name: 'https://a:secret99@h/m'}\ndata: {path: y}", [], "line 1: model.name"),
        # Cut to fit the sentence, a token would no longer look like one.
        ("model: {name: x}\ndata: {path: y}", [f"seed={TOKEN}{TOKEN}"], "--set seed=[hidden]"),
        ("model: {name: x}\ndata: {path: y}", [f"title={'q' * 50}{TOKEN}"], "--set title=qqq"),
        (f"model: {{name: x}}\ndata: {{path: y}}\nseed: {'q' * 20}{TOKEN}", [], "line 3: seed"),
        (f"model: {{name: x}}\ndata: {{path: y}}\n{TOKEN}: 3", [], "line 3"),
    ],
)
def test_a_recipe_with_a_secret_is_refused_without_repeating_it(
    text: str, overrides: list[str], place: str
) -> None:
    with pytest.raises(RecipeError) as raised:
        parse_recipe(text, "r.yaml", overrides)
    said = str(raised.value)
    assert place in said
    assert TOKEN[:16] not in said
    assert "secret99" not in said


def test_tracebacks_warnings_and_log_lines_of_a_command_are_redacted(tmp_path: Path) -> None:
    """In a process of its own, as ``halfbyte`` starts: a defect, in a thread too."""
    script = tmp_path / "defect.py"
    script.write_text(
        "import logging, threading, warnings, sys, os\n"
        "import halfbyte.cli.data as broken\n"
        "token = os.environ['HF_TOKEN']\n"
        "def fail(*_, **__):\n"
        "    warnings.warn(f'warned of {token}')\n"
        "    logging.getLogger('x').warning('logged %s', token)\n"
        "    def inner():\n"
        "        raise ValueError(f'thread {token}')\n"
        "    t = threading.Thread(target=inner); t.start(); t.join()\n"
        "    try:\n"
        "        raise OSError(f'first https://ann:{token}@host')\n"
        "    except OSError as error:\n"
        "        raise ValueError(f'then {token}') from error\n"
        "import halfbyte.recipe.load as load\n"
        "load.load_recipe = fail\n"
        "sys.argv = ['halfbyte', 'data', 'x.yaml']\n"
        "from halfbyte.cli import main\n"
        "main()\n"
    )
    secret = "plainsecretwithoutform"
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "HF_TOKEN": secret},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    for said in ("warned of", "logged", "ValueError: thread", "OSError: first", "ValueError: then"):
        assert said in done.stderr
    assert secret not in done.stdout + done.stderr


# ---- everything at once -------------------------------------------------------------------------

# Each variable with a value of its own, so that what leaks says from where; none has a known form.
CANARIES = {
    name: f"canary{number}{name.lower().replace('_', '')}"
    for number, name in enumerate(
        ("HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
    )
}
IN_URL = "canary7inaurl"

# Lets TensorBoard's writer, in its own process, and a library in the run's fail with the canaries
# in their messages, warn of them and log them.
FAILING = """
import os, sys
said = " ".join(os.environ[n] for n in CANARIES) + f" http://ann:{IN_URL}@host/x"
def fail(*_, **__):
    import logging, warnings
    warnings.warn(said)
    logging.getLogger("library").error(said)
    raise RuntimeError(said)
if "halfbyte.trackers.worker" in sys.orig_argv:
    import tensorboard.summary.writer.event_file_writer as writer
    writer.EventFileWriter.add_event = fail
""".replace("CANARIES", repr(list(CANARIES))).replace("{IN_URL}", IN_URL)


@pytest.fixture
def refusing() -> Iterator[int]:
    """The port of a server that refuses everything and repeats what it was sent."""

    class Refusing(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = json.dumps({"error": f"{self.headers}", "path": self.path}).encode()
            self.send_response(403)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_HEAD = answer

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def typed(folder: Path, port: int, *words: str, then: str = "") -> subprocess.CompletedProcess[str]:
    """``halfbyte WORDS`` in a process where every secret is a canary; ``then`` runs before it."""
    (folder / "sitecustomize.py").write_text(FAILING)
    script = folder / "typed.py"
    script.write_text(
        f"import sys, sitecustomize\n{then}\nsys.argv = ['halfbyte', *{words!r}]\n"
        "from halfbyte.cli import main\nmain()\n"
    )
    server = f"http://ann:{IN_URL}@127.0.0.1:{port}"
    return subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env={
            **os.environ,
            **CANARIES,
            "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
            "HF_ENDPOINT": server,
            "HF_HOME": str(folder / "hub"),
            "WANDB_MODE": "offline",
            "MLFLOW_TRACKING_URI": server,
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
            "TEAM_ROOM": f"http://127.0.0.1:{port}/in/{IN_URL}",
        },
        capture_output=True,
        text=True,
        check=False,
    )


def leaks(done: subprocess.CompletedProcess[str], folder: Path) -> list[str]:
    """Which canaries stand in what was printed, or in any file of ``folder``."""
    told = [("stdout", done.stdout.encode()), ("stderr", done.stderr.encode())]
    told += [(str(path), path.read_bytes()) for path in folder.rglob("*") if path.is_file()]
    secrets = [*CANARIES.values(), IN_URL, TOKEN]
    return [f"{s} in {place}" for s in secrets for place, text in told if s.encode() in text]


def test_a_run_whose_trackers_and_libraries_fail_leaks_nothing(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, refusing: int
) -> None:
    for tool in ("tensorboard", "wandb", "mlflow"):
        pytest.importorskip(tool)
    settings = (
        "training: {max_steps: 2}",
        "evaluation: {prompts: 0}",
        "trackers: {tensorboard: true, wandb: {project: p}, mlflow: {experiment: e}, "
        "webhook: {url_env: TEAM_ROOM}}",
    )
    commented = f"model: {{name: {tiny_model}}}  # {TOKEN}\ndata: {{path: {tiny_rows}}}\n"
    (tmp_path / "r.yaml").write_text(commented + "".join(f"{line}\n" for line in settings))
    words = ["train", "r.yaml", "--out", "run"]
    # The run itself dies after its last step, of a library.
    then = "import halfbyte.run.training as t\nt.end_run = sitecustomize.fail\n"
    then += (
        "import halfbyte.trackers.listener as l\nl.END_SECONDS = 300.0"  # however busy it is here
    )
    done = typed(tmp_path, refusing, *words, then=then)
    assert done.returncode == 1, done.stderr
    assert "RuntimeError: [hidden] [hidden] [hidden] [hidden] http://[hidden]@host/x" in done.stderr
    record = (tmp_path / "run" / "events.jsonl").read_text()
    for tool in ("tensorboard", "mlflow", "webhook"):
        assert f"trackers.{tool} is off: it failed" in record
    assert list((tmp_path / "run" / "wandb").rglob("*.wandb"))
    assert leaks(done, tmp_path / "run") == []
    # A report made later, by somebody who lacks the secrets, has only the records.
    make_report(tmp_path / "run")
    assert leaks(done, tmp_path / "run") == []
    assert "# [hidden]" in (tmp_path / "run" / "recipe.asked.yaml").read_text()


def test_what_the_hub_refuses_is_a_sentence_without_secrets(
    tiny_rows: Path, tmp_path: Path, refusing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = f"http://ann:{IN_URL}@127.0.0.1:{refusing}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server)
    monkeypatch.setenv("HF_ENDPOINT", server)
    for name, canary in CANARIES.items():
        monkeypatch.setenv(name, canary)
    monkeypatch.chdir(tmp_path)
    words = ["train", "--data", tiny_rows, "--out", "run", "--model"]
    said = halfbyte(*words, "harbour/lost", code=2).stderr
    assert "harbour/lost" in said
    refused = halfbyte(*words, f"https://ann:{IN_URL}@host/m", code=2).stderr
    assert "model.name holds what looks like a token or a password" in refused
    for secret in (*CANARIES.values(), IN_URL):
        assert secret not in said + refused
