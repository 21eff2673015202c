"""benchmarks/gpu_vs_peers.py without a GPU: stand-ins for the processes that it starts."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
gpu_vs_peers = importlib.import_module("gpu_vs_peers")
cases = importlib.import_module("peers.cases")
device_memory = importlib.import_module("peers.device_memory")
kernel_time = importlib.import_module("peers.kernel_time")
run_peer = importlib.import_module("peers.run_peer")
runner = importlib.import_module("peers.runner")
summary = importlib.import_module("peers.summary")

# Does what the real programs print, and notes that it was called. What a key is to do otherwise
# stands in behaviour.json of the working directory.
STAND_IN = """
import json, os, sys, time
from pathlib import Path

here = Path.cwd()
module, words = sys.argv[2], sys.argv[3:]
spec = {}
if module == "halfbyte":
    key = Path(words[words.index("--out") + 1]).name
elif module == "peers.prepare":
    key = words[0]
else:
    spec = json.loads(words[0])
    key = spec["key"]
with (here / "calls").open("a") as file:
    file.write(key + "\\n")
behaviour = json.loads((here / "behaviour.json").read_text()).get(key, {})
time.sleep(behaviour.get("sleep", 0))
if "fail" in behaviour:
    print("Traceback\\nOops: " + behaviour["fail"], file=sys.stderr)
    sys.exit(1)
if key == "context":
    print(json.dumps({"reserved_bytes": 0, "gpu": "a GPU"}))
elif module == "halfbyte":
    out = Path(words[words.index("--out") + 1])
    out.mkdir(parents=True)
    events = [{"kind": "step", "seconds": 0.01}, {"kind": "phase", "name": "x", "seconds": 1}]
    (out / "events.jsonl").write_text("".join(json.dumps(e) + "\\n" for e in events))
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    print("caches: " + ("warm" if cache.exists() else "cold"), file=sys.stderr)
    cache.mkdir(exist_ok=True, parents=True)
elif spec:
    count = spec["warmup"] + spec["steps"]
    ms = behaviour.get("ms", 10.0 if spec["tool"] == "halfbyte" else 300.0)
    path = os.environ["PYTHONPATH"].split(os.pathsep)
    (here / ("path-" + spec["tool"])).write_text(json.dumps(path))
    print("noise on standard output")
    print(json.dumps({
        "ms": [ms] * spec["steps"],
        "step_tokens": [100 + i + behaviour.get("more", 0) for i in range(count)],
        "step_labels": [96 + i for i in range(count)],
        "losses": [10.0] * count,
        "gpu_busy_ms": ms / 3, "kernels": 5,
        "versions": {"torch": "2", "datasets": "5" if spec["tool"] == "halfbyte" else "4"},
        "memory_limit_gb": spec.get("memory_limit_gb"),
    }))
"""


class Place:
    """A working directory with the stand-in, and the command over it."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self.work.mkdir()
        (folder / "site").mkdir()
        (folder / "rows.json").write_text("[]")
        (folder / "stand_in.py").write_text(STAND_IN)
        self.folder = folder
        self.out = folder / "results.json"
        self.behave({})

    def behave(self, behaviour: dict[str, dict[str, Any]]) -> None:
        (self.work / "behaviour.json").write_text(json.dumps(behaviour))

    def run(self, *words: str, code: int = 0) -> None:
        rows = str(self.folder / "rows.json")
        given = ["--data", rows, "--tokenizer", rows, "--site", str(self.folder / "site")]
        given += ["--workdir", str(self.work), "--out", str(self.out), *words]
        python = [sys.executable, str(self.folder / "stand_in.py")]
        assert gpu_vs_peers.main(given, python) == code

    @property
    def calls(self) -> list[str]:
        """Keys of the processes started so far, those that prepare left out."""
        keys = (self.work / "calls").read_text().split()
        return [key for key in keys if key not in ("model", "context")]

    def value(self, case: str, tool: str, metric: str) -> float:
        rows = json.loads(self.out.read_text())["rows"]
        [row] = [r for r in rows if (r["case"], r["tool"], r["metric"]) == (case, tool, metric)]
        return row["value"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("PYTHONPATH", "/somebody/elses")
    return Place(tmp_path)


FREE = ("--cases", "tinyllama-free", "--steps", "4")


def test_tools_alternate_and_the_best_round_counts(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.behave({"tinyllama-free/trl/1": {"ms": 400.0}, "tinyllama-free/halfbyte/2": {"ms": 12.0}})
    place.run(*FREE)

    case = "tinyllama-free"
    tools = ["halfbyte", "unsloth", "trl"]
    in_order = [f"{case}/{tool}/{number}" for number in (1, 2) for tool in tools]
    assert place.calls == [*in_order, f"{case}/halfbyte/profile"]
    assert place.value(case, "trl", "ms_per_step") == 300.0
    assert place.value(case, "halfbyte", "ms_per_step") == 10.0
    # 4 timed steps follow 5 of warm-up, of 105 to 108 tokens.
    assert place.value(case, "trl", "tokens_per_step") == 106.5
    assert place.value(case, "trl", "tokens_per_s") == pytest.approx(106.5 / 0.3)
    assert place.value(case, "halfbyte", "steps_timed") == cases.HALFBYTE_STEPS
    # By the token: halfbyte's steps are more, and longer towards the end.
    ours = 10.0 / place.value(case, "halfbyte", "tokens_per_step")
    assert place.value(case, "halfbyte / trl", "ratio") == pytest.approx(300 / 106.5 / ours)
    assert place.value(case, "halfbyte / trl", "ratio_busy") == pytest.approx(100 / 106.5 / ours)
    document = json.loads(place.out.read_text())
    assert document.keys() == {"command", "commit", "date", "device", "versions", "rows"}
    assert document["device"] == "a GPU"
    assert document["versions"] == {"torch": "2", "datasets": "5", "datasets (peers)": "4"}
    shown = capsys.readouterr().out
    assert "times as fast as unsloth" in shown
    assert "!" not in shown


def test_peers_and_halfbyte_never_share_packages(place: Place) -> None:
    place.run(*FREE, "--rounds", "1")
    peer, own = (
        json.loads((place.work / f"path-{tool}").read_text()) for tool in ("trl", "halfbyte")
    )
    site = str(place.folder / "site")
    assert site in peer
    assert site not in own
    assert str(BENCHMARKS.parent / "src") in own
    assert not any(part.endswith(("src", ".carry/site")) for part in peer)
    assert "/somebody/elses" not in peer + own


def test_a_second_command_goes_on(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.run(*FREE, "--rounds", "1")
    first = place.calls
    place.run(*FREE, "--rounds", "2")
    added = place.calls[len(first) :]
    assert added == [f"tinyllama-free/{tool}/2" for tool in ("halfbyte", "unsloth", "trl")]

    # Nothing is left to do: not even the preparation is started again.
    before = (place.work / "calls").read_text()
    place.run(*FREE)
    assert (place.work / "calls").read_text() == before

    # A line that a killed process has torn is measured again, and nothing else.
    path = place.work / "measurements.jsonl"
    path.write_text(path.read_text()[:-20])
    place.run(*FREE)
    assert place.calls[len(first) + 3 :] == ["tinyllama-free/trl/2"]
    assert sum(key.startswith("command ") for key in runner.read_measurements(path)) == 3
    assert json.loads(place.out.read_text())["rows"]


def test_a_failure_is_recorded_and_stops_nothing(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.behave({"tinyllama-free/unsloth/1": {"fail": "out of memory"}})
    place.run(*FREE, "--rounds", "1")
    assert "tinyllama-free/trl/1" in place.calls
    line = runner.read_measurements(place.work / "measurements.jsonl")["tinyllama-free/unsloth/1"]
    assert line["error"] == "Oops: out of memory"
    assert "! tinyllama-free/unsloth/1 FAILED: Oops: out of memory" in capsys.readouterr().out

    done = len(place.calls)
    place.run(*FREE, "--rounds", "1")
    assert len(place.calls) == done
    place.behave({})
    place.run(*FREE, "--rounds", "1", "--retry")
    assert place.calls[done:] == ["tinyllama-free/unsloth/1"]
    assert place.value("tinyllama-free", "unsloth", "ms_per_step") == 300.0


def test_a_hung_process_is_killed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.behave({"tinyllama-fp16/halfbyte/1": {"sleep": 60}})
    monkeypatch.setattr(cases.Measurement, "timeout_s", 2.0)
    began = time.monotonic()
    place.run("--cases", "tinyllama-fp16", "--rounds", "2")
    assert time.monotonic() - began < 30
    found = runner.read_measurements(place.work / "measurements.jsonl")
    assert "killed after 2 s" in found["tinyllama-fp16/halfbyte/1"]["error"]
    assert "error" not in found["tinyllama-fp16/halfbyte/2"]


def test_the_budget_keeps_what_would_not_fit(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """50 s are too few for what Unsloth is thought to take, and enough for halfbyte."""
    place.run(*FREE, "--rounds", "1", "--budget-s", "50")
    assert "tinyllama-free/halfbyte/1" in place.calls
    assert "tinyllama-free/unsloth/1" not in place.calls
    shown = capsys.readouterr().out
    assert "run again: tinyllama-free/unsloth/1" in shown.splitlines()[-1]
    place.run(*FREE, "--rounds", "1")
    assert place.calls.count("tinyllama-free/halfbyte/1") == 1
    # Once it was seen to be quick, 50 s are enough for its next round.
    place.run(*FREE, "--rounds", "2", "--budget-s", "50")
    assert "tinyllama-free/unsloth/2" in place.calls


def test_what_the_budget_cuts_off_is_no_failure(place: Place) -> None:
    place.run("--cases", "tinyllama-fp16", "--rounds", "1")
    place.behave({"tinyllama-fp16/halfbyte/2": {"sleep": 60}})
    place.run("--cases", "tinyllama-fp16", "--rounds", "2", "--budget-s", "9")
    found = runner.read_measurements(place.work / "measurements.jsonl")
    assert "tinyllama-fp16/halfbyte/2" in place.calls
    assert "tinyllama-fp16/halfbyte/2" not in found


def test_unequal_work_is_said_loudly(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.behave({"tinyllama-free/trl/1": {"more": 7}})
    place.run(*FREE, "--rounds", "1")
    warning = (
        "! NOT THE SAME WORK: tinyllama-free/trl/1 has 107 tokens in step 1 and "
        "tinyllama-free/halfbyte/1 100"
    )
    assert warning in capsys.readouterr().out.splitlines()


def test_cold_then_warm(place: Place) -> None:
    place.run("--cases", "recipe-cold", "recipe-warm")
    in_order = [
        f"recipe-{kind}-halfbyte-{number}" for number in (1, 2) for kind in ("cold", "warm")
    ]
    assert place.calls == in_order
    for name in in_order:
        said = (place.work / "logs" / f"{name}.err").read_text()
        assert f"caches: {name.split('-')[1]}" in said
    assert place.value("recipe-warm", "halfbyte", "wall_s") > 0
    assert place.value("recipe-cold", "halfbyte", "steps_timed") == 1


def test_warm_alone_is_refused_and_done_later(place: Place) -> None:
    place.run("--cases", "recipe-warm", "--rounds", "1", code=2)
    place.run("--cases", "recipe-cold", "recipe-warm", "--rounds", "1")
    assert place.calls == ["recipe-cold-halfbyte-1", "recipe-warm-halfbyte-1"]


class FakeDriver:
    """A device on which a process takes 3 GiB for a moment, then 1 GiB."""

    name = "fake"

    def __init__(self, tells_processes: bool) -> None:
        self.readings = [2, 5, 3]
        self.tells = tells_processes

    def used(self) -> int:
        return (self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]) * 2**30

    def used_by(self, pids: set[int]) -> int | None:
        return 2**31 if self.tells else None


@pytest.mark.parametrize("tells_processes", [True, False])
def test_peak_memory_is_the_process_less_the_context(
    monkeypatch: pytest.MonkeyPatch, tells_processes: bool
) -> None:
    monkeypatch.setattr(device_memory, "INTERVAL_S", 0.001)
    sampler = device_memory.MemorySampler(
        FakeDriver(tells_processes), 1, baseline=2 * 2**30, frozen=lambda: False
    )
    sampler.start()
    while sampler._samples < 4:
        time.sleep(0.001)
    memory = sampler.stop()
    assert memory["device_bytes"] == 3 * 2**30
    context = {"device_bytes": 500, "process_bytes": None, "reserved_bytes": 200}
    if tells_processes:
        context["process_bytes"] = 700
    expected = 2**31 - 500 if tells_processes else 3 * 2**30 - 300
    assert device_memory.peak_bytes(memory, context) == expected
    # A count that the context does not have is not mixed with the other one.
    assert device_memory.peak_bytes(memory | {"device_bytes": None}, {"device_bytes": 5}) is None


def test_the_limit_of_the_tight_case_is_what_unsloth_took(place: Place) -> None:
    limits = []

    class Recorded(runner.Runner):  # type: ignore[name-defined,misc]
        def _start(self, key: str, program: list[str], *args: Any) -> Any:
            if "halfbyte" in key:
                limits.append(json.loads(program[-1])["memory_limit_gb"])
            return super()._start(key, program, *args)

        def _peak(self, memory: dict[str, Any]) -> int | None:
            return 1_500_000_000

    run = Recorded(
        place.work,
        place.folder,
        place.folder,
        None,
        [],
        headroom_gb=0.1,
        python=[sys.executable, str(place.folder / "stand_in.py")],
    )
    [unsloth, halfbyte, *_] = cases.measurements(["tinyllama-tight"], 1, 4)
    assert "not measured" in run.measure(halfbyte)["error"]
    assert run.run_all([unsloth, halfbyte]) == []
    assert limits == [1.4]
    figures, warnings = summary.summarise(run.found)
    ours = figures["tinyllama-tight", "halfbyte"]
    assert ours["memory_limit_gib"] == pytest.approx(1.4e9 / 2**30)
    assert warnings == []
    # It is said where the limit was not kept, or not put.
    line = run.found[halfbyte.key]
    run.found[halfbyte.key] = line | {"peak_bytes": 1_600_000_000}
    assert "halfbyte took 1.490 GiB, unsloth 1.397" in summary.summarise(run.found)[1][0]
    run.found[halfbyte.key] = line | {"memory_limit_gb": None}
    assert "NO LIMIT" in summary.summarise(run.found)[1][0]


def test_busy_time_is_a_union(tmp_path: Path) -> None:
    assert kernel_time.union_length([(10, 5), (0, 4), (12, 2), (14, 3)]) == 11
    trace = tmp_path / "trace.json"
    kinds = [("kernel", 0, 2000), ("kernel", 1000, 2000), ("gpu_memcpy", 9000, 500)]
    kinds.append(("cuda_runtime", 0, 99999))
    events = [{"ph": "X", "cat": cat, "ts": ts, "dur": dur} for cat, ts, dur in kinds]
    trace.write_text(json.dumps({"traceEvents": events}))
    assert kernel_time.read_trace(trace, 2) == {
        "gpu_busy_ms": 1.75,
        "kernels": 1.0,
        "span_ms": 4.75,
    }


def test_steps_under_the_profiler_are_those_made() -> None:
    profile = {"gpu_busy_ms": 9.0, "kernels": 100.0, "span_ms": 10.5}
    assert kernel_time.for_steps_made(profile, 10, 10.0) == profile
    # The losses of 16 steps were read while the numbers went on by 10.
    late = {name: value * 1.6 for name, value in profile.items()}
    corrected = kernel_time.for_steps_made(late, 10, 10.4)
    assert corrected == pytest.approx(profile)


def test_labels_are_counted_alike_however_a_batch_is_laid_out() -> None:
    """Rows of 3 and 2 tokens: 5 tokens, of which 3 are predicted."""
    import torch

    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    padded = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    flat = ids.flatten()[:5][None]
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    layouts = [
        padded,
        {"input_ids": flat, "position_ids": positions, "labels": flat},
        {"input_ids": flat, "packed_seq_lengths": torch.tensor([3, 2]), "labels": flat},
    ]
    for inputs in layouts:
        assert [int(x) for x in run_peer.count(inputs)] == [5, 3]
