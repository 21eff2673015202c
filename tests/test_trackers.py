"""Trackers: what was written is read back by the tools themselves, and none can hurt a run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from halfbyte import Recipe, train
from halfbyte.errors import RecipeError
from halfbyte.events import read_events
from halfbyte.events.types import (
    Diverged,
    Evaluated,
    Event,
    Finished,
    Interrupted,
    RolledBack,
    RunStarted,
    Step,
    TrainingStarted,
    Warned,
)
from halfbyte.recipe.load import parse_recipe
from halfbyte.redaction import redact
from halfbyte.run import rehearse
from halfbyte.trackers import choose, feed, listener
from halfbyte.trackers.listener import Trackers

WEBHOOK = {"webhook": {"url_env": "TEAM_ROOM"}}


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy this machine is, the trackers get to send everything."""
    monkeypatch.setattr(listener, "END_SECONDS", 300.0)
    monkeypatch.setattr(listener, "STOP_SECONDS", 300.0)


def recipe(**trackers: object) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": "base"},
            "data": {"path": "rows.jsonl"},
            "training": {"learning_rate": 0.003},
            "trackers": trackers,
        }
    )


def step(number: int, loss: float) -> Step:
    return Step(number, number / 10, loss, 1e-3 / number, 1.5, 400, 200, 0.5, 3 * 2**30)


def followed(
    folder: Path, asked: Recipe, events: list[Event], *, resumed: int | None = None
) -> list[str]:
    """Let trackers follow a run of ``events`` as ``train`` does; gives the warnings of it."""
    folder.mkdir(exist_ok=True)
    warnings: list[str] = []

    def record(event: Event) -> None:
        if isinstance(event, Warned):
            warnings.append(event.text)
        trackers(event)

    with Trackers(asked, record) as trackers:
        trackers(RunStarted("0.1.0", ["halfbyte"], str(folder), resumed))
        trackers(Warned("2 rows were cut"))
        trackers.begin(asked, folder)
        trackers(TrainingStarted(20, 2, 1, 10, 5, 2.0, "CPU", "fp32"))
        for event in events:
            record(event)
    return warnings


def steps(first: int, last: int, shift: float = 0.0) -> list[Event]:
    return [step(number, 3 - number / 10 + shift) for number in range(first, last + 1)]


# The process dies after step 7; the run goes on from the checkpoint of step 4, and is rolled back
# from step 8 to 6 on the way.
FIRST = [*steps(1, 3), Evaluated(3, "adapter", 2.5, 9, 3, 0.1), *steps(4, 7)]
SECOND: list[Event] = [
    *steps(5, 8, 0.5),
    RolledBack(8, 6, "loss_spike"),
    *steps(7, 10, 1.0),
    Evaluated(10, "adapter", 1.5, 9, 3, 0.1),
    Finished(10, 5.0),
]
LAST_DONE = {n: 3 - n / 10 + (0.0 if n < 5 else 0.5 if n < 7 else 1.0) for n in range(1, 11)}


def test_tensorboard_reads_each_step_as_it_was_done_last(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    asked = recipe(tensorboard=True)
    assert followed(tmp_path / "run", asked, [*FIRST, Interrupted(7, "SIGTERM")]) == []
    assert followed(tmp_path / "run", asked, SECOND, resumed=4) == []
    found = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    losses = {e.step: e.value for e in found.Scalars("train/loss")}
    assert losses == pytest.approx(LAST_DONE)
    assert len(found.Scalars("train/loss")) == 10
    assert [(e.step, e.value) for e in found.Scalars("eval/loss")] == [(3, 2.5), (10, 1.5)]
    assert found.Scalars("train/memory_gib")[0].value == 3.0
    assert found.Scalars("train/tokens_per_second")[0].value == 800.0
    assert found.Scalars("train/learning_rate")[1].value == pytest.approx(1e-3 / 2)
    assert found.Tensors("warnings")[-1].tensor_proto.string_val == [b"2 rows were cut"]
    assert (
        b"| training.learning_rate | `0.003` |"
        in found.Tensors("recipe")[-1].tensor_proto.string_val[0]
    )
    assert (
        b"finished after step 10 of 10" in found.Tensors("outcome")[-1].tensor_proto.string_val[0]
    )


def wandb_records(folder: Path) -> Iterator[Any]:
    """The records of the offline run in ``folder``: protocol buffers in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = next(folder.glob("*.wandb")).read_bytes()
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32_768 - at % 32_768 < 7:  # too little is left of the block for a header
            at += 32_768 - at % 32_768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_NAME", raising=False)
    asked = recipe(wandb={"project": "harbour"})
    assert followed(tmp_path / "run", asked, [*FIRST, Interrupted(7, "SIGTERM")]) == []
    first = set((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert followed(tmp_path / "run", asked, SECOND, resumed=4) == []
    second = set((tmp_path / "run" / "wandb").glob("offline-run-*")) - first
    losses: dict[int, float] = {}
    ids = set()
    for folder in [*first, *second]:
        for record in wandb_records(folder):
            match record.WhichOneof("record_type"):
                case "run":
                    ids.add((record.run.run_id, record.run.project, record.run.display_name))
                    config = {c.key: c.value_json for c in record.run.config.update}
                    if config:
                        assert config["training.learning_rate"] == "0.003"
                case "history":
                    row = {
                        i.key or ".".join(i.nested_key): json.loads(i.value_json)
                        for i in record.history.item
                    }
                    if "train/loss" in row:
                        losses[row["step"]] = row["train/loss"]
                case "summary":
                    told = {u.key: u.value_json for u in record.summary.update if u.key}
                    if "warnings" in told:
                        assert json.loads(told["warnings"]) == ["2 rows were cut"]
                case "exit":
                    assert record.exit.exit_code == (1 if folder in first else 0)
    assert losses == pytest.approx(LAST_DONE)
    kept = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]["id"]
    assert ids == {(kept, "harbour", "run")}


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    where = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", where)
    asked = recipe(mlflow={"experiment": "harbour"})
    assert followed(tmp_path / "run", asked, [*FIRST, Interrupted(7, "SIGTERM")]) == []
    client = mlflow.MlflowClient(where)
    experiment = client.get_experiment_by_name("harbour").experiment_id
    assert [r.info.status for r in client.search_runs([experiment])] == ["KILLED"]
    assert followed(tmp_path / "run", asked, SECOND, resumed=4) == []
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params["training.learning_rate"] == "0.003"
    assert run.data.tags["warnings"] == "2 rows were cut"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    losses = {m.step: m.value for m in sorted(history, key=lambda m: m.timestamp)}
    assert losses == pytest.approx(LAST_DONE)
    assert run.data.metrics["eval/loss"] == 1.5


# ---- the webhook --------------------------------------------------------------------------------


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """A server on this machine that TEAM_ROOM leads to; what was posted to it."""
    posted: list[dict[str, Any]] = []

    class Room(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posted.append({"path": self.path, **json.loads(body)})
            self.send_response(200 if "good" in self.path else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Room)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TEAM_ROOM", f"http://127.0.0.1:{server.server_port}/good/5e6f7a8b9c")
    yield posted
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("end", "outcome", "reason"),
    [
        (Finished(7, 1.0), "finished", ""),
        (Interrupted(7, "SIGTERM"), "interrupted", "SIGTERM"),
        (Diverged(7, "the loss of step 7 is NaN", []), "diverged", "the loss of step 7 is NaN"),
    ],
)
def test_a_webhook_is_told_of_the_end(
    room: list[dict[str, Any]], tmp_path: Path, end: Event, outcome: str, reason: str
) -> None:
    base = Evaluated(0, "quantized base", 3.25, 9, 3, 0.1)
    assert followed(tmp_path / "harbour-1", recipe(**WEBHOOK), [base, *FIRST, end]) == []
    (told,) = room
    assert (told["run"], told["outcome"], told["reason"]) == ("harbour-1", outcome, reason)
    assert (told["step"], told["steps"]) == (7, 10)
    assert (told["loss"], told["held_out_loss_before"], told["held_out_loss"]) == (2.3, 3.25, 2.5)
    assert told["seconds"] >= 0
    assert f"harbour-1 {outcome} after step 7 of 10" in told["text"]
    assert told["content"] == told["text"]


def test_a_webhook_is_told_of_an_exception_without_its_secrets(
    room: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-secret-that-has-no-form")

    def fail() -> None:
        with Trackers(recipe(**WEBHOOK), print) as trackers:
            trackers.begin(recipe(**WEBHOOK), tmp_path)
            raise MemoryError("no room for a-secret-that-has-no-form")

    with pytest.raises(MemoryError):
        fail()
    assert room[0]["outcome"] == "failed"
    assert room[0]["reason"] == "MemoryError: no room for [hidden]"
    assert "a-secret" not in json.dumps(room)


def test_a_second_ctrl_c_is_told_of_as_well(room: list[dict[str, Any]], tmp_path: Path) -> None:
    def stop() -> None:
        with Trackers(recipe(**WEBHOOK), print) as trackers:
            trackers.begin(recipe(**WEBHOOK), tmp_path)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert room[0]["outcome"] == "interrupted"


def test_a_loss_that_is_no_number_is_null_for_a_webhook(
    room: list[dict[str, Any]], tmp_path: Path
) -> None:
    events = [step(1, float("nan")), Diverged(1, "the loss of step 1 is NaN", [])]
    assert followed(tmp_path / "run", recipe(**WEBHOOK), events) == []
    assert room[0]["loss"] is None


def test_a_webhook_that_is_refused_is_a_warning_that_hides_its_url(
    room: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = os.environ["TEAM_ROOM"].replace("good", "gone")
    monkeypatch.setenv("TEAM_ROOM", url)
    (said,) = followed(tmp_path / "run", recipe(**WEBHOOK), [*FIRST, Finished(7, 1.0)])
    assert said.startswith("trackers.webhook is off: it failed (OSError: the server answered 404")
    assert "5e6f7a8b9c" not in said
    # Whatever a library says of it from now on.
    assert "5e6f7a8b9c" not in redact("no route to /gone/5e6f7a8b9c")


def test_a_process_that_dies_is_told_of_as_lost(room: list[dict[str, Any]], tmp_path: Path) -> None:
    """As by the system when memory is out: nothing of the run's own can say so any more."""
    dying = f"""
        import os, signal
        from pathlib import Path
        from halfbyte import Recipe, train
        from halfbyte.trackers.listener import Trackers
        asked = Recipe.model_validate({recipe(**WEBHOOK).model_dump()!r})
        trackers = Trackers(asked, print)
        trackers.begin(asked, Path({str(tmp_path)!r}))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(dying)], check=False)
    assert done.returncode == -signal.SIGKILL
    until(lambda: bool(room))
    assert room[0]["outcome"] == "lost"


def test_a_signal_to_the_whole_job_leaves_the_end_to_be_told(
    room: list[dict[str, Any]], tmp_path: Path
) -> None:
    """As a scheduler sends it to every process, before it kills them."""
    with Trackers(recipe(**WEBHOOK), print) as trackers:
        trackers.begin(recipe(**WEBHOOK), tmp_path)
        found = psutil.Process().children()
        (worker,) = [p for p in found if "halfbyte.trackers.worker" in p.cmdline()]
        until(lambda: bool(ignored(worker.pid) >> (signal.SIGTERM - 1) & 1))
        worker.terminate()
        trackers(Interrupted(1, "SIGTERM"))
    assert room[0]["outcome"] == "interrupted"


def ignored(process: int) -> int:
    """The mask of the signals that a process ignores."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("SigIgn:")[2].split()[0], 16)


def until(true: Callable[[], bool]) -> None:
    """Wait for something that another process does; two minutes are for a machine under load."""
    for _ in range(12_000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def alive(group: int) -> bool:
    """Whether a process of ``group`` is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# ---- trackers that do harm ----------------------------------------------------------------------

HOSTILE = {
    "raises at once": "raise SystemExit(3)",
    "raises later": "sys.stdin.readline(); sys.stdin.readline(); raise SystemExit(4)",
    "crashes": "os.kill(os.getpid(), 11)",
    "hangs": "time.sleep(1000)",
    "hangs in spite of signals": "signal.signal(15, signal.SIG_IGN); time.sleep(1000)",
    "floods": "\nwhile True: sys.stdout.write('x' * 1000 + '\\n'); sys.stderr.write('y' * 1000)",
    "starts what hangs": "subprocess.run(['sleep', '1000'])",
}
# Each harms a run in its own way at the same time.
HOSTILE_TOGETHER = f"""
name = sys.argv[-1]
if name == "tensorboard":
    {HOSTILE["raises later"]}
if name == "wandb":
    {HOSTILE["hangs"]}
{HOSTILE["floods"]}
"""


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Puts a script in the place of a tracker; its process's number lands in the file given."""

    def make(code: str) -> Path:
        numbers = tmp_path / "numbers"
        script = tmp_path / "hostile.py"
        script.write_text(
            "import os, signal, subprocess, sys, time\n"
            f"open({str(numbers)!r}, 'a').write(f'{{os.getpid()}}\\n')\n{code}\n"
        )
        monkeypatch.setattr(feed, "WORKER", (sys.executable, str(script)))
        monkeypatch.setattr(feed, "PAUSE", 0.01)
        monkeypatch.setattr(listener, "END_SECONDS", 0.3)
        monkeypatch.setattr(choose, "find_spec", lambda name: object())
        return numbers

    return make


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tracker_is_off_with_one_warning_and_its_processes_end(
    hostile: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    numbers = hostile(HOSTILE[name])
    warnings = followed(tmp_path / "run", recipe(tensorboard=True), [*FIRST, Finished(7, 1.0)])
    (said,) = warnings
    assert said.startswith("trackers.tensorboard is off: it ")
    # Neither it nor what it started: the system may take a moment to clear away the last of them.
    until(lambda: not any(alive(int(number)) for number in numbers.read_text().split()))


def test_a_warning_that_a_full_disk_does_not_take_is_let_go(
    hostile: Callable[[str], Path], tmp_path: Path
) -> None:
    hostile(HOSTILE["raises at once"])

    def full(event: Event) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Trackers(recipe(tensorboard=True), full) as trackers:
        trackers.begin(recipe(tensorboard=True), tmp_path)
        trackers(Finished(1, 1.0))


def test_a_slow_tracker_loses_the_oldest_events_and_they_are_counted(
    hostile: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile(HOSTILE["hangs"])
    monkeypatch.setattr(feed, "PAUSE", 1_000.0)  # the thread takes nothing before the end
    asked = recipe(tensorboard=True)
    numbers = feed.QUEUE + 250
    warnings = followed(tmp_path / "run", asked, [*steps(1, numbers), Finished(numbers, 1.0)])
    # The warning before step 1 was an event as well.
    assert "trackers.tensorboard missed 251 events" in warnings[-1]


def test_what_is_missing_is_one_sentence_before_step_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    for name, asked in (
        ("tensorboard", recipe(tensorboard=True)),
        ("wandb", recipe(wandb={"project": "p"})),
        ("mlflow", recipe(mlflow={"experiment": "e"})),
    ):
        with pytest.raises(RecipeError, match=rf"pip install 'halfbyte\[{name}\]'"):
            Trackers(asked, print)
    monkeypatch.delenv("TEAM_ROOM", raising=False)
    with pytest.raises(RecipeError, match="TEAM_ROOM, which is not set"):
        Trackers(recipe(**WEBHOOK), print)
    monkeypatch.setenv("TEAM_ROOM", "hooks.example.org/a-secret-path")
    with pytest.raises(RecipeError, match="begin with https://") as raised:
        Trackers(recipe(**WEBHOOK), print)
    assert "a-secret-path" not in str(raised.value)


def test_a_rehearsal_says_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="not installed"):
        rehearse(recipe(tensorboard=True))


def test_a_url_in_the_recipe_is_refused_and_not_repeated() -> None:
    url = "https://chat.example.org/in/0123456789abcdef"
    text = f"model: {{name: x}}\ndata: {{path: y}}\ntrackers:\n  webhook: {{url_env: '{url}'}}"
    with pytest.raises(
        RecipeError, match=r"line 4: trackers\.webhook\.url_env must be the name"
    ) as raised:
        parse_recipe(text, "r.yaml")
    assert "0123456789abcdef" not in str(raised.value)


def test_no_tool_is_imported_by_the_run() -> None:
    code = (
        "import sys, halfbyte.trackers.listener\n"
        "print([m for m in ('tensorboard', 'wandb', 'mlflow', 'urllib.request', 'torch') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_hostile_trackers_leave_the_adapter_as_it_is(
    hostile: Callable[[str], Path], tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    asked = {
        "model": {"name": str(tiny_model)},
        "data": {"path": str(tiny_rows), "held_out": 4},
        "training": {"batch_size": 4, "gradient_accumulation": 1, "max_steps": 6},
        "evaluation": {"prompts": 0, "base_loss": False},
    }

    def adapter(name: str, **trackers: object) -> tuple[str, list[str]]:
        made = Recipe.model_validate({**asked, "trackers": trackers})
        run = train(made, out=tmp_path / name, runs=tmp_path)
        told = [r.event.text for r in read_events(run.folder) if isinstance(r.event, Warned)]
        weights = (run.adapter / "adapter_model.safetensors").read_bytes()
        return hashlib.sha256(weights).hexdigest(), [t for t in told if t.startswith("trackers.")]

    alone, warned = adapter("alone")
    assert warned == []
    hostile(HOSTILE_TOGETHER)
    every = {"tensorboard": True, "wandb": {"project": "p"}, "mlflow": {"experiment": "e"}}
    same, warned = adapter("followed", **every)
    assert same == alone
    assert sorted(text.split()[0] for text in warned) == [
        f"trackers.{name}" for name in sorted(every)
    ]


def test_a_resumed_run_goes_on_in_its_trackers(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    """Killed between two checkpoints, so that steps are done again."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    asked = Recipe.model_validate(
        {
            "model": {"name": str(tiny_model)},
            "data": {"path": str(tiny_rows), "held_out": 4},
            "training": {"batch_size": 4, "gradient_accumulation": 1, "max_steps": 8},
            "evaluation": {"prompts": 0, "base_loss": False, "every_steps": 3},
            "checkpoints": {"every_steps": 3},
            "trackers": {"tensorboard": True},
        }
    )

    class Killed(Exception): ...

    def kill(event: Event) -> None:
        if isinstance(event, Step) and event.step == 5:
            raise Killed

    with pytest.raises(Killed):
        train(asked, out=tmp_path / "run", runs=tmp_path, listeners=[kill])
    run = train(resume=tmp_path / "run", runs=tmp_path)
    found = reader.EventAccumulator(str(run.folder / "tensorboard")).Reload()
    losses = [(e.step, e.value) for e in found.Scalars("train/loss")]
    assert losses == [(number, pytest.approx(loss)) for number, loss in run.losses()]
    assert [e.step for e in found.Scalars("eval/loss")] == [3, 6, 8]
    outcomes = [e.tensor_proto.string_val[0] for e in found.Tensors("outcome")]
    assert b"finished after step 8 of 8" in outcomes[-1]
