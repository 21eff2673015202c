"""The hub client against a small hub of our own: download, licence, absence, no network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PICKLED = "org/pickled"

# Opens each model named; prints what came of it, one JSON list.
SCRIPT = """
import json, sys
from halfbyte.errors import HalfbyteError
from halfbyte.model.source import open_model
from halfbyte.recipe.schema import ModelRecipe
out = []
for name in sys.argv[1:]:
    try:
        source = open_model(ModelRecipe(name=name))
        out.append([source.format, len(source.names()), source.licence])
    except HalfbyteError as error:
        out.append(str(error))
print(json.dumps(out))
"""


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub's API does, for ``org/tiny``, ``org/gated`` and ``org/pickled``."""

    files: dict[str, dict[str, bytes]]

    def do_GET(self) -> None:
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.repository("/".join(parts[2:4]), parts[4:])
        else:
            self.file("/".join(parts[:2]), "/".join(parts[4:]))

    do_HEAD = do_GET

    def repository(self, name: str, rest: list[str]) -> None:
        if name not in self.files:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": p, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for p, b in self.files[name].items()
            ]
            self.answer(200, json.dumps(tree).encode())
        else:
            siblings = [{"rfilename": p, "size": len(b)} for p, b in self.files[name].items()]
            info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(info).encode())

    def file(self, name: str, path: str) -> None:
        if name == "org/gated":
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif path in self.files.get(name, {}):
            body = self.files[name][path]
            etag = hashlib.sha1(body).hexdigest()
            self.answer(200, body, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[str]:
    tiny = {p.name: p.read_bytes() for p in tiny_model.iterdir()}
    tiny["README.md"] = b"---\nlicense: mit\n---\n"
    tiny["consolidated.safetensors"] = b"not to be fetched"
    pickled = {"config.json": tiny["config.json"], "pytorch_model.bin": b""}
    Hub.files = {"org/tiny": tiny, "org/gated": tiny, PICKLED: pickled}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def open_all(names: list[str], home: Path, endpoint: str, offline: bool) -> list[object]:
    env = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint}
    env |= {"HF_HUB_OFFLINE": "1" if offline else "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", SCRIPT, *names]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_hub(hub: str, tmp_path: Path) -> None:
    names = ["org/tiny", "org/gated", PICKLED, "org/absent"]
    tiny, gated, pickled, absent = open_all(names, tmp_path, hub, offline=False)
    assert tiny == ["safetensors", 21, "mit"]
    assert "accept" in str(gated)
    assert f"{hub}/org/gated" in str(gated)
    assert "pickled" in str(pickled)
    assert "no model of that name" in str(absent)
    assert not list(tmp_path.rglob("consolidated.safetensors"))
    # Offline: what was downloaded is there, what was not is one sentence.
    tiny, gated = open_all(names[:2], tmp_path, hub, offline=True)
    assert tiny == ["safetensors", 21, "mit"]
    assert "cannot be reached" in str(gated)
    # The same where nothing answers.
    tiny, absent = open_all([names[0], names[3]], tmp_path, "http://127.0.0.1:9", offline=False)
    assert tiny == ["safetensors", 21, "mit"]
    assert "cannot be reached" in str(absent)
