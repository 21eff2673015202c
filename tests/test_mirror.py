"""Mirrors of a run's checkpoints: in a folder, and on a small hub of our own."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from halfbyte.checkpoint.state import CheckpointState
from halfbyte.errors import RunError
from halfbyte.events.types import Event, Mirrored, Warned
from halfbyte.mirror import folder_target
from halfbyte.mirror.mirror import Mirror, names_in
from halfbyte.run.mirroring import bring_back
from halfbyte.run.restore import restore
from mirror_hub_case import SIGNATURE, TOKEN, Repositories, environment, serving

RUN = "the-run"


def make_checkpoint(run: Path, step: int, more: str = "") -> Path:
    """A checkpoint folder as one is defined: its files, and a manifest that lists them."""
    folder = run / "checkpoints" / f"step-{step}"
    (folder / "initial_adapter").mkdir(parents=True)
    state = CheckpointState("id", step, None, None, None, {}, "cpu", {})
    contents = {
        "state.safetensors": os.urandom(3000),
        "state.json": json.dumps(state.plain()).encode(),
        "recipe.yaml": f"seed: 42 # {more}".encode(),
        "events.jsonl": b"{}\n" * step,
        "initial_adapter/adapter_model.safetensors": os.urandom(100),
    }
    files = {}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        files[name] = {"bytes": len(content), "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    return folder


def is_whole(folder: Path) -> bool:
    """By the definition of a checkpoint, and not by the code under test."""
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    return all(
        hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
        for name, entry in listed.items()
    )


def same(a: Path, b: Path) -> bool:
    def content(folder: Path) -> dict[str, bytes]:
        files = [p for p in folder.rglob("*") if p.is_file()]
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}

    return content(a) == content(b)


def until(seen: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not seen() and time.monotonic() < end:
        time.sleep(0.01)
    assert seen()


def texts(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Warned)]


class Case:
    """A run folder, a mirror of it, and what it said."""

    def __init__(self, place: Path, where: str) -> None:
        self.run = place / RUN
        self.run.mkdir()
        self.where = where
        self.there = Path(where) / RUN
        self.events: list[Event] = []

    def open(self, run_id: str | None = "id", **more: object) -> Mirror:
        more = {"must_answer": True, "pauses": (0.01,), **more}
        return Mirror.open(self.where, self.run, run_id, self.events.append, **more)

    def names(self) -> set[str]:
        return {p.name for p in (self.there / "checkpoints").iterdir()}


def settle(mirror: Mirror) -> None:
    until(lambda: not mirror.in_use())
    mirror.tell()


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path, str(tmp_path / "mirror"))


def make_results(run: Path, text: str = "one") -> None:
    (run / "adapter").mkdir(exist_ok=True)
    (run / "adapter" / f"{text}.safetensors").write_text(text)
    (run / "report.html").write_text(text)
    (run / "recipe.yaml").write_text(text)
    (run / "run.lock").write_text("not to be copied")


# In a folder.


def test_a_mirror_holds_what_the_run_holds(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    sync = folder_target._sync

    def look(fd: int) -> None:
        """At every file that is finished: what shows is whole, and there is always something."""
        folder = case.there / "checkpoints"
        if folder.exists():
            shown = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
            assert all(is_whole(folder / name) for name in shown)
            seen.append(shown)
        sync(fd)

    monkeypatch.setattr(folder_target, "_sync", look)
    mirror = case.open()
    kept: dict[int, list[int]] = {2: [2], 4: [2, 4], 6: [2, 4, 6], 8: [4, 6, 8]}
    for step, keep in kept.items():
        made = make_checkpoint(case.run, step)
        mirror.send(made, keep)
        settle(mirror)
        assert same(made, case.there / "checkpoints" / made.name)
        assert case.names() == {f"step-{n}" for n in keep}
    first = seen.index({"step-2"})
    assert all(seen[first:])
    make_results(case.run)
    mirror.finish(case.run)
    assert (case.there / "adapter" / "one.safetensors").read_text() == "one"
    assert (case.there / "report.html").read_text() == "one"
    assert not (case.there / "run.lock").exists()
    assert [e.step for e in case.events if isinstance(e, Mirrored)] == [2, 4, 6, 8, None]
    assert not texts(case.events)
    # The same again: what is there is left, what has changed is replaced.
    inode = (case.there / "checkpoints/step-8/state.safetensors").stat().st_ino
    shutil.rmtree(case.run / "adapter")
    make_results(case.run, "two")
    again = case.open()
    again.send(case.run / "checkpoints/step-8", [4, 6, 8])
    again.finish(case.run)
    assert (case.there / "checkpoints/step-8/state.safetensors").stat().st_ino == inode
    assert [p.name for p in (case.there / "adapter").iterdir()] == ["two.safetensors"]


def test_an_older_checkpoint_that_waits_is_dropped(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, copy, copied = threading.Event(), folder_target.FolderTarget._copy, []

    def slow(self: folder_target.FolderTarget, source: Path, target: Path) -> None:
        go.wait(60)
        copied.append(source.parent.name)
        copy(self, source, target)

    monkeypatch.setattr(folder_target.FolderTarget, "_copy", slow)
    mirror = case.open()
    made = [make_checkpoint(case.run, step) for step in (1, 2, 3)]
    mirror.send(made[0], [1])
    until(lambda: (case.there / "checkpoints").exists())
    mirror.send(made[1], [1, 2])
    assert mirror.in_use() == {1, 2}
    mirror.send(made[2], [2, 3])
    assert mirror.in_use() == {1, 3}  # those that the run must not remove yet
    go.set()
    mirror.finish(None)
    assert case.names() == {"step-3"}
    assert "step-2" not in copied


class Faulty:
    """Makes the call number ``at``, of all that change the disk in the mirror's thread, fail."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, at: int, code: int) -> None:
        self.count = 0
        self.folder = folder
        for module, name in [
            (os, "fsync"),
            (os, "mkdir"),
            (os, "rename"),
            (os, "replace"),
            (os, "open"),
        ]:
            self._wrap(patch, module, name, at, code)
        self._wrap(patch, Path, "open", at, code)

    def _wrap(
        self, patch: pytest.MonkeyPatch, module: object, name: str, at: int, code: int
    ) -> None:
        real = getattr(module, name)

        def call(*words: object, **more: object) -> object:
            if threading.current_thread().name == "mirror" and self.count < at:
                self.count += 1
                if self.count == at:
                    # Looked at later, and by other means than those wrapped here.
                    shutil.copytree(self.folder, self.folder.with_name("seen"))
                    raise OSError(code, os.strerror(code), "there")
            return real(*words, **more)

        patch.setattr(module, name, call)


@pytest.mark.parametrize(("code", "stride"), [(errno.ENOSPC, 1), (errno.EIO, 5)])
def test_whatever_call_fails_nothing_half_is_shown_and_it_is_made_up_for(
    tmp_path: Path, code: int, stride: int
) -> None:
    at, told = 1 - stride, 0
    failed = True
    while failed:
        at += stride
        place = tmp_path / str(at)
        place.mkdir()
        case = Case(place, str(place / "mirror"))
        mirror = case.open()
        mirror.send(make_checkpoint(case.run, 1), [1])
        settle(mirror)
        two = make_checkpoint(case.run, 2)
        with pytest.MonkeyPatch.context() as patch:
            faulty = Faulty(patch, case.there / "checkpoints", at, code)
            mirror.send(two, [2])
            until(lambda m=mirror: not m.in_use())
        for seen in case.there.glob("seen"):
            shown = [p for p in seen.iterdir() if p.name[0] != "."]
            assert shown
            assert all(is_whole(p) for p in shown)
        shown = [p for p in (case.there / "checkpoints").iterdir() if p.name[0] != "."]
        assert [p.name for p in shown] == ["step-2"]
        assert same(two, shown[0])
        mirror.finish(None)
        failed = faulty.count >= at
        # A few do no harm: a folder that is there is not made, what is hidden is removed later.
        told += len(texts(case.events))
        assert len(texts(case.events)) <= failed
        shutil.rmtree(place)
    assert at > 20
    assert told > 12 / stride


def test_a_failure_is_told_of_once_a_kind(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []
    codes = iter([errno.ENOSPC] * 5 + [errno.EROFS] * 5 + [errno.ENOSPC] * 5)
    copy = folder_target.FolderTarget._copy

    def fail(self: folder_target.FolderTarget, source: Path, target: Path) -> None:
        code = next(codes, None)
        tries.append(code)
        if code is not None:
            raise OSError(code, os.strerror(code))
        copy(self, source, target)

    monkeypatch.setattr(folder_target.FolderTarget, "_copy", fail)
    mirror = case.open()
    mirror.send(make_checkpoint(case.run, 1), [1])
    settle(mirror)
    assert len(tries) > 15
    full, read_only = texts(case.events)
    assert "No space left" in full
    assert "Read-only" in read_only
    assert case.names() == {"step-1"}


def test_pauses_grow_until_the_next_checkpoint(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: folder_target.FolderTarget, source: Path, target: Path) -> None:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(folder_target.FolderTarget, "_copy", fail)
    mirror = case.open(pauses=(0.01, 0.02, 1000.0))
    mirror.send(make_checkpoint(case.run, 1), [1])
    until(lambda: mirror._failed == 3)
    assert mirror._try_at - time.monotonic() > 500
    mirror.send(make_checkpoint(case.run, 2), [2])
    until(lambda: mirror._failed == 4)
    assert mirror.in_use() == {2}
    mirror.finish(None)  # tries for a last time at once
    assert mirror._failed == 5
    first, last = texts(case.events)
    assert "does not take copies" in first
    assert "not in the mirror" in last
    assert "step-2" in last


@pytest.mark.parametrize("patience", [0.2, 60.0])
def test_a_mirror_that_hangs_holds_nobody_up(
    case: Case, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    go = threading.Event()
    monkeypatch.setattr(folder_target.FolderTarget, "_copy", lambda *words: go.wait(60))
    monkeypatch.setattr(folder_target.FolderTarget, "patience", patience)
    mirror = case.open()
    mirror.send(make_checkpoint(case.run, 1), [1])
    make_results(case.run)
    until(lambda: (case.there / "checkpoints").exists())
    mirror.finish(case.run, wait=0.5 if patience > 1 else 1000.0)
    go.set()
    assert texts(case.events) == [
        f"not in the mirror {case.there}: step-1 and the adapter and the report; copy it from the "
        "run folder"
    ]


def test_a_mirror_that_never_answers_at_the_start(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    monkeypatch.setattr(folder_target.FolderTarget, "open", lambda *words, make: go.wait(60))
    with pytest.raises(RunError, match="no answer in"):
        case.open(answer_seconds=0.05)
    case.open(answer_seconds=0.05, must_answer=False)
    assert "no answer in" in texts(case.events)[0]
    go.set()


def test_a_mirror_that_disappears_and_comes_back(case: Case) -> None:
    mirror = case.open(pauses=(1000.0,))
    mirror.send(make_checkpoint(case.run, 1), [1])
    settle(mirror)
    away = case.there.parent.with_name("away")
    case.there.parent.rename(away)
    mirror.send(make_checkpoint(case.run, 2), [1, 2])
    until(lambda: mirror.tell() or texts(case.events))
    # What was mounted on is an empty folder, on the disk that the mirror is to be safe from.
    case.there.parent.mkdir()
    mirror.send(make_checkpoint(case.run, 3), [1, 3])
    until(lambda: mirror._failed == 2)
    assert not list(case.there.parent.iterdir())
    case.there.parent.rmdir()
    away.rename(case.there.parent)
    mirror.send(make_checkpoint(case.run, 4), [1, 4])
    mirror.finish(None)
    assert case.names() == {"step-1", "step-4"}
    assert len(texts(case.events)) == 1


def test_another_run_of_the_same_name_is_refused(case: Case) -> None:
    first = case.open("first run")
    first.send(make_checkpoint(case.run, 1), [1])
    first.finish(None)
    with pytest.raises(RunError, match=r"another run \(first ru\) under the name"):
        case.open("second run")
    with pytest.raises(RunError, match="another run"):
        case.open("second run", must_answer=False)
    assert case.open("first run").run_id == case.open(None).run_id == "first run"
    (case.there / "mirror.json").write_text("{}")
    with pytest.raises(RunError, match="something else"):
        case.open("first run")
    (case.there / "mirror.json").unlink()
    with pytest.raises(RunError, match="something else"):
        case.open("first run")
    assert case.names() == {"step-1"}


def test_a_run_that_left_nothing_whole_makes_way(case: Case) -> None:
    first = case.open("first run")
    first.send(make_checkpoint(case.run, 1), [1])
    first.finish(None)
    (case.there / "checkpoints/step-1/manifest.json").unlink()  # its process was killed
    second = case.open("second run")
    second.send(make_checkpoint(case.run, 2), [2])
    second.finish(None)
    assert case.open(None).run_id == "second run"
    assert not texts(case.events)


def test_another_run_that_shows_only_later(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    away = Path(case.where)
    case.where = str(away / "below")
    mirror = case.open(must_answer=False, pauses=(1000.0,))
    assert "cannot be reached" in texts(case.events)[0]
    other = Case(away.parent / RUN, case.where)
    away.mkdir()
    theirs = other.open("other")
    theirs.send(make_checkpoint(other.run, 1), [1])
    theirs.finish(None)
    mirror.send(make_checkpoint(case.run, 5), [5])
    mirror.finish(None)
    assert other.names() == {"step-1"}
    assert "another run" in texts(case.events)[1]


def test_the_newest_whole_checkpoint_comes_back(case: Case, tmp_path: Path) -> None:
    mirror = case.open()
    assert case.open(None).newest(tmp_path / "back") is None
    made = {step: make_checkpoint(case.run, step) for step in (9, 10, 11, 12)}
    for path in made.values():
        mirror.send(path, list(made))
        settle(mirror)
    mirror.finish(None)
    there = case.there / "checkpoints"
    (there / "step-12" / "manifest.json").unlink()  # half copied by other means
    damaged = there / "step-11" / "state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    (there / ".step-13.ab.partial").mkdir()
    found = case.open(None).newest(tmp_path / "back")
    assert found == tmp_path / "back" / "step-10"
    assert same(found, made[10])
    assert texts(case.events) == [
        f"step-11 in the mirror {case.there} is not whole: an earlier one is taken"
    ]
    assert [p.name for p in (tmp_path / "back").iterdir()] == ["step-10"]
    # A link in a mirror leads nowhere.
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (there / "step-10" / "state.json").unlink()
    (there / "step-10" / "state.json").symlink_to(secret)
    assert case.open(None).newest(tmp_path / "back").name == "step-9"  # type: ignore[union-attr]


def test_a_lost_folder_is_made_again(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = case.open()
    made = {step: make_checkpoint(case.run, step) for step in (1, 2)}
    for path in made.values():
        mirror.send(path, [1, 2])
        settle(mirror)
    kept = shutil.copytree(case.run, tmp_path / "kept")
    shutil.rmtree(case.run)
    assert restore(case.where, case.run, case.events.append) == made[2]
    assert same(made[2], kept / "checkpoints/step-2")
    assert not made[1].exists()
    for name in ("recipe.yaml", "events.jsonl", "initial_adapter/adapter_model.safetensors"):
        assert (case.run / name).read_bytes() == (made[2] / name).read_bytes()
    assert "brought to step-2 from the mirror" in texts(case.events)[-1]
    # Nothing newer: nothing is done. What is newer there, or whole there alone, comes.
    (case.run / "events.jsonl").write_text("{}\n" * 9)
    assert restore(case.where, case.run, case.events.append) is None
    assert (case.run / "events.jsonl").read_text() == "{}\n" * 9
    (made[2] / "state.safetensors").write_bytes(b"damaged")
    assert restore(case.where, case.run, case.events.append) == made[2]
    assert is_whole(made[2])
    # Ended before the record was put back: what is there is no run yet.
    (case.run / "events.jsonl").unlink()

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(RunError, match=r"cannot be made again of .*step-2 \(full\)"):
            restore(case.where, case.run, case.events.append)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", full)
        with pytest.raises(RunError, match="cannot be made again"):
            restore(case.where, case.run, case.events.append)
    with monkeypatch.context() as patch:
        patch.setattr(folder_target, "_sync", lambda fd: full(case.run, case.run))
        with pytest.raises(RunError, match=r"the disk of .*checkpoints is full"):
            restore(case.where, case.run, case.events.append)
    assert not (case.run / "events.jsonl").exists()
    assert restore(case.where, case.run, case.events.append) == made[2]
    assert (case.run / "events.jsonl").exists()
    assert not list(case.run.glob(".*"))


def test_what_cannot_be_brought_back(case: Case, tmp_path: Path) -> None:
    assert restore(case.where, tmp_path / "other", case.events.append) is None
    assert not (tmp_path / "other").exists()
    mirror = case.open("another")
    mirror.send(make_checkpoint(case.run, 1), [1])
    mirror.finish(None)
    (case.run / "events.jsonl").touch()
    with pytest.raises(RunError, match="hold different runs"):
        restore(case.where, case.run, case.events.append)
    Path(case.where).rename(tmp_path / "away")
    Path(case.where).touch()
    restore(case.where, case.run, case.events.append)  # a run is here: it goes on without
    assert "does not take copies" in texts(case.events)[-1]
    (case.run / "events.jsonl").unlink()
    with pytest.raises(RunError, match="cannot be used"):  # else the mirror's would be replaced
        restore(case.where, case.run, case.events.append)


def test_the_newest_run_of_a_recipe_is_found_in_the_mirror(tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir()
    for name in ("lima-2026-01-09-2", "lima-2026-01-09-10", "other-2027-01-01-1"):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        mirror = Mirror.open(str(tmp_path / "mirror"), run, name, print, must_answer=True)
        mirror.send(make_checkpoint(run, 3), [3])
        mirror.finish(None)
    shutil.rmtree(tmp_path / "runs")
    assert names_in(str(tmp_path / "mirror"))[0] == "lima-2026-01-09-10"
    bring_back(
        str(tmp_path / "mirror"),
        resume="auto",
        out=None,
        runs=tmp_path / "runs",
        recipe_name="lima",
        emit=lambda event: None,
    )
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["lima-2026-01-09-10"]
    assert (tmp_path / "runs/lima-2026-01-09-10/events.jsonl").exists()


def test_what_an_ended_process_left_is_cleared(case: Case) -> None:
    left = case.there / ".mirror.json.ab.partial"
    left.parent.mkdir(parents=True)
    left.touch()
    (case.there / ".adapter.ab.old").mkdir()
    mirror = case.open()
    mirror.send(make_checkpoint(case.run, 1), [1])
    mirror.finish(None)
    assert case.names() == {"step-1"}
    assert not list(case.there.glob(".*"))


def test_places_that_are_no_mirror(case: Case) -> None:
    for where, text in {
        case.run.parent: "in the run folder",
        case.run: "in the run folder",
        case.run / "inside": "in the run folder",
        "s3://bucket": "neither a folder nor hf://",
        "hf://owner": "no repository of the hub",
        "hf://owner/repo/../other": "no repository of the hub",
        "/nowhere/at/all": "cannot be reached .*No such file",
    }.items():
        case.where = str(where)
        with pytest.raises(RunError, match=text):
            case.open()
    file = case.run.parent / "file"
    file.touch()
    case.where = str(file)
    with pytest.raises(RunError, match="cannot be used"):
        case.open()


# On the hub.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Repositories]:
    with serving() as (hub, address):
        for name, value in environment(address, tmp_path).items():
            monkeypatch.setenv(name, value)
        yield hub


def steps_of(tree: dict[str, bytes]) -> set[str]:
    """The checkpoint folders of a commit, each of which must be whole."""
    below = f"models/{RUN}/checkpoints/"
    names = {path.removeprefix(below).split("/")[0] for path in tree if path.startswith(below)}
    for name in names:
        listed = json.loads(tree[f"{below}{name}/manifest.json"])["files"]
        for file, entry in listed.items():
            content = tree[f"{below}{name}/{file}"]
            assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    return names


def test_a_mirror_on_the_hub(hub: Repositories, tmp_path: Path) -> None:
    case = Case(tmp_path, "hf://org/copies/models")
    mirror = case.open()
    made = {step: make_checkpoint(case.run, step) for step in (1, 2, 3)}
    for step, keep in {1: [1], 2: [1, 2], 3: [2, 3]}.items():
        mirror.send(made[step], keep)
        settle(mirror)
    make_results(case.run)
    mirror.finish(case.run)
    assert not texts(case.events)
    assert hub.private == {"org/copies": True}
    states = [steps_of(tree) for tree in hub.trees["org/copies"]]
    one, two, three = "step-1", "step-2", "step-3"
    assert states == [set(), {one}, {one, two}, {one, two, three}, {two, three}, {two, three}]
    last = hub.files("org/copies")
    assert last[f"models/{RUN}/adapter/one.safetensors"] == b"one"
    assert f"models/{RUN}/run.lock" not in last

    assert names_in(case.where) == [RUN]
    again = case.open(None)
    assert again.run_id == "id"
    found = again.newest(tmp_path / "back")
    assert found is not None
    assert same(found, made[3])
    assert [p.name for p in (tmp_path / "back").iterdir()] == ["step-3"]
    with pytest.raises(RunError, match="another run"):
        case.open("another")
    hub.fail = {"mirror.json": 403}  # that it cannot be read does not say that it is not there
    with pytest.raises(RunError, match="cannot be used"):
        case.open("another")


def test_failures_of_the_hub_are_clauses_without_secrets(
    hub: Repositories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, "hf://org/copies")
    hub.private["org/copies"], hub.trees["org/copies"] = False, [{}]
    mirror = case.open(pauses=(1000.0,))
    assert "open to all" in texts(case.events)[0]
    made = make_checkpoint(case.run, 1)

    def outcome() -> str:
        failed = mirror._failed
        mirror.send(made, [1])
        until(lambda: mirror._failed > failed)
        mirror.tell()
        return texts(case.events)[-1]

    hub.fail = {"PUT upload": 403}  # behind an address that is signed
    assert "lets this log-in not write to org/copies (403)" in outcome()
    hub.fail = {"commit": 400}
    assert "the hub refused (400)" in outcome()
    hub.fail = {}
    hub.ignored = {"events.jsonl"}
    assert "events.jsonl did not arrive; see the .gitignore" in outcome()
    hub.ignored = set()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in outcome()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match="the hub cannot be reached"):
        case.open()
    said = repr(case.events)
    assert TOKEN not in said
    assert SIGNATURE not in said
    assert "127.0.0.1" not in said


def test_no_log_in_is_one_sentence(
    hub: Repositories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RunError, match=r"log in with hf auth login, or set HF_TOKEN"):
        Case(tmp_path, "hf://org/copies").open()
    assert not hub.trees


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_hub_that_hangs_holds_nobody_up(hub: Repositories, tmp_path: Path) -> None:
    case = Case(tmp_path, "hf://org/copies")
    mirror = case.open()
    hub.hang = "PUT upload"
    mirror.send(make_checkpoint(case.run, 1), [1])
    until(lambda: any("PUT upload" in line for line in hub.asked))
    worker = mirror._target._worker  # type: ignore[attr-defined]
    mirror.finish(None, wait=0.2)
    assert "not in the mirror hf://org/copies/the-run: step-1" in texts(case.events)[-1]
    until(lambda: not Path(f"/proc/{worker.pid}").exists() or worker.poll() is not None)
    until(lambda: not mirror._thread.is_alive())  # type: ignore[union-attr]
