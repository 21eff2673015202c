"""A small hub of our own that takes uploads: repositories, large files, commits, private by login.

What it answers follows the hub's API as its own client reads it; a commit is kept as a whole tree,
so that a test can look at every state that anybody could have seen.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

from huggingface_hub import ModelCard

TOKEN = "hf_" + "secret" * 6
SIGNATURE = "X-Amz-Signature=of-this-upload"


class Repositories:
    """What the hub holds, and how it is to misbehave."""

    def __init__(self) -> None:
        self.trees: dict[str, list[dict[str, bytes]]] = {}  # repository: its tree at each commit
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}  # SHA-256: content
        self.asked: list[str] = []  # method and path of every request
        self.fail: dict[str, int] = {}  # a part of a request's line: status to answer with
        self.hang: str | None = None  # a part of a request's line that is never answered
        self.released = threading.Event()
        self.ignored: set[str] = set()  # last parts of names that .gitignore leaves out
        self.owners = {"org"}  # in whose names the login may write
        self.branches: set[tuple[str, str]] = set()  # repository and branch, beside main
        self.refused_metadata: str | None = None  # a line of it that the hub does not take

    def files(self, repo: str) -> dict[str, bytes]:
        return self.trees[repo][-1]


class _Handler(BaseHTTPRequestHandler):
    hub: Repositories

    def handle_all(self) -> None:
        hub, path = self.hub, unquote(urlparse(self.path).path).strip("/")
        line = f"{self.command} {path}"
        hub.asked.append(line)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.chunks()
        for part, status in hub.fail.items():
            if part in line:
                return self.answer(status, b"{}")
        if hub.hang is not None and hub.hang in line:
            hub.released.wait(60)
            return None
        parts = path.split("/")
        if parts[0] == "upload":  # the address itself is signed
            assert hashlib.sha256(body).hexdigest() == parts[1]
            hub.large[parts[1]] = body
            return self.answer(200, b"")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if parts[:2] == ["api", "repos"]:
            return self.create(json.loads(body))
        if parts[:2] == ["api", "validate-yaml"]:
            return self.validate(json.loads(body)["content"])
        if parts[:2] == ["api", "models"]:
            return self.repository("/".join(parts[2:4]), parts[4:], body)
        if parts[1].endswith(".git"):
            return self.batch(json.loads(body))
        return self.file("/".join(parts[:2]), "/".join(parts[4:]))

    do_GET = do_HEAD = do_POST = do_PUT = handle_all

    def chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def validate(self, card: str) -> None:
        """As the hub: YAML that its client can read, and no metadata that is said to be refused."""
        refused = self.hub.refused_metadata
        if refused is not None and refused in card:
            errors = [{"message": f"{refused} is not allowed"}]
            return self.answer(400, json.dumps({"errors": errors, "warnings": []}).encode())
        ModelCard(card)
        return self.reply({"errors": [], "warnings": []})

    def create(self, asked: dict[str, object]) -> None:
        if asked["organization"] not in self.hub.owners:
            return self.answer(403, b"{}")
        repo = f"{asked['organization']}/{asked['name']}"
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.private[repo] = private
        self.hub.trees[repo] = [{".gitattributes": b"*.safetensors filter=lfs"}]
        return self.reply({"url": f"{self.base}/{repo}"})

    def repository(self, repo: str, rest: list[str], body: bytes) -> None:
        if repo not in self.hub.trees:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        tree = self.hub.files(repo)
        if not rest:
            sha = f"{len(self.hub.trees[repo]):040x}"
            return self.reply({"id": repo, "sha": sha, "private": self.hub.private[repo]})
        if rest[0] == "tree":
            below = "/".join([*rest[2:], ""]) if rest[2:] else ""
            found = {p: b for p, b in tree.items() if p.startswith(below)}
            if not found:
                return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return self.reply([self.listed(path, content) for path, content in found.items()])
        if rest[0] == "branch":
            self.hub.branches.add((repo, rest[1]))
            return self.reply({})
        if rest[0] == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": file["path"].rsplit("/", 1)[-1] in self.hub.ignored,
                }
                for file in json.loads(body)["files"]
            ]
            return self.reply({"files": modes})
        assert rest[0] == "commit"
        self.hub.trees[repo].append(self.committed(dict(tree), body))
        url = f"{self.base}/{repo}/commit/1"
        return self.reply({"commitUrl": url, "commitOid": "1" * 40, "pullRequestUrl": None})

    def listed(self, path: str, content: bytes) -> dict[str, object]:
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        found = {"type": "file", "path": path, "size": len(content), "oid": blob}
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 in self.hub.large:
            found["oid"] = "0" * 40  # of the pointer
            found["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
        return found

    def committed(self, tree: dict[str, bytes], body: bytes) -> dict[str, bytes]:
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                tree[value["path"]] = self.hub.large[value["oid"]]
            elif item["key"] == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                assert any(path.startswith(folder) for path in tree)
                tree = {p: b for p, b in tree.items() if not p.startswith(folder)}
        return tree

    def batch(self, asked: dict[str, list[dict[str, object]]]) -> None:
        objects = []
        for item in asked["objects"]:
            url = f"{self.base}/upload/{item['oid']}?{SIGNATURE}"
            known = item["oid"] in self.hub.large
            actions = {} if known else {"actions": {"upload": {"href": url}}}
            objects.append({**item, **actions})
        self.reply({"transfer": "basic", "objects": objects})

    def file(self, repo: str, path: str) -> None:
        if repo not in self.hub.trees:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        tree = self.hub.files(repo)
        if path not in tree:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha1(tree[path]).hexdigest()
        return self.answer(200, tree[path], {"X-Repo-Commit": "1" * 40, "ETag": f'"{etag}"'})

    @property
    def base(self) -> str:
        return f"http://{self.headers['Host']}"

    def reply(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[tuple[Repositories, str]]:
    """A hub, empty at first, and its address."""
    hub = Repositories()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()


def environment(address: str, folder: Path) -> dict[str, str]:
    """What leads the hub's client to ``address``, logged in, its own files below ``folder``."""
    return {
        "HF_ENDPOINT": address,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(folder / "hub_home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
