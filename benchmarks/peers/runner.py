"""Runs the measurements one after another, each in a process of its own, and keeps what they say.

Each finished measurement is one line of ``measurements.jsonl``, written at once, so that a second
command goes on where the first one ended, be it by its own budget or not.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.cases import PEERS, Measurement
from peers.device_memory import Driver, MemorySampler, peak_bytes

ROOT = Path(__file__).resolve().parents[2]
FILE_NAME = "measurements.jsonl"
CONTEXT = "context"
# Where a recipe's first run leaves what its second finds: Triton's, Inductor's, the CUDA driver's
# and halfbyte's own caches.
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "XDG_CACHE_HOME")


@dataclass
class Ended:
    """How a process ended: its exit code (None where it was killed), output, seconds, memory."""

    code: int | None
    stdout: str
    stderr: str
    seconds: float
    memory: dict[str, Any]


@dataclass
class Runner:
    """What is known and where things lie; paths are absolute.

    ``site`` holds the peers' packages and ``own_path`` halfbyte and its own: never both in one
    process, since their versions differ. ``python`` starts every process.
    """

    work: Path
    data: Path
    tokenizer: Path
    site: Path | None
    own_path: list[Path]
    python: list[str] = field(default_factory=lambda: [sys.executable])
    headroom_gb: float = 0.0
    deadline: float = float("inf")  # of time.monotonic()
    retry: bool = False
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
    driver: Driver = field(default_factory=Driver)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("logs", "runs"):
            (self.work / name).mkdir(parents=True, exist_ok=True)
        path = self.work / FILE_NAME
        self.found = read_measurements(path)
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            with path.open("a") as file:  # a process died while writing: end its line
                file.write("\n")

    # ---- what is kept ------------------------------------------------------

    def keep(self, line: dict[str, Any]) -> None:
        self.found[line["key"]] = line
        with (self.work / FILE_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def is_done(self, key: str) -> bool:
        """Whether it need not be done again; one that could not even be started must be."""
        line = self.found.get(key)
        if line is None or "error" not in line:
            return line is not None
        return not self.retry and line["process_s"] > 0

    def expected_s(self, measurement: Measurement) -> float:
        """As long as another round of the same took, else as it is thought to."""
        start = f"{measurement.case.name}/{measurement.tool}/"
        took = [
            line["process_s"]
            for key, line in self.found.items()
            if key.startswith(start) and "error" not in line and not key.endswith("/profile")
        ]
        return max(took) if took else measurement.expected_s

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    # ---- in order ----------------------------------------------------------

    def prepare(self, wanted: Iterable[Measurement]) -> str | None:
        """Model, rows and the context's size; returns what is wrong, if anything."""
        rows: dict[tuple[int, int], int] = {}
        for m in wanted:
            shape = (m.case.rows, m.case.batch)
            rows[shape] = max(rows.get(shape, 0), m.steps + 8 if m.tool in PEERS else 0)
        words = [f"{n}:{batch}:{steps}" for (n, batch), steps in rows.items() if steps]
        places = [str(self.data), str(self.tokenizer), str(self.work)]
        program = ["-m", "peers.prepare", "model", *places, *words]
        ended = self._start("prepare", program, self._own_environment(), 180)
        if ended.code != 0:
            return f"the model and the rows could not be made: {last_line(ended)}"
        self.say(f"model and rows: {ended.seconds:.0f} s")
        if CONTEXT not in self.found:
            program = ["-m", "peers.prepare", CONTEXT]
            ended = self._start(CONTEXT, program, self._own_environment(), 90)
            result = last_json(ended.stdout)
            if ended.code != 0 or result is None:
                return f"no CUDA context could be made: {last_line(ended)}"
            self.keep({"key": CONTEXT, **result, **ended.memory, "process_s": ended.seconds})
        return None

    def run_all(self, wanted: Iterable[Measurement]) -> list[str]:
        """Do what is not done yet; returns the keys that the time left did not do for."""
        late = []
        for measurement in wanted:
            key = measurement.key
            if self.is_done(key):
                continue
            expected = self.expected_s(measurement)
            if expected > self.left_s:
                late.append(key)
                continue
            line = self.measure(measurement)
            if line is None:
                late.append(key)
                continue
            self.keep(line)
            self.say(f"{key}: {brief(line)} ({line['process_s']:.0f} s)")
        return late

    def measure(self, measurement: Measurement) -> dict[str, Any] | None:
        """One measurement; None where the budget, and not its own limit, has ended it."""
        key = measurement.key
        line: dict[str, Any] = {"key": key, "case": measurement.case.name, "process_s": 0.0}
        line |= {"tool": measurement.tool, "round": measurement.round}
        spec = measurement.spec(str(self.work)) | {"data": str(self.data)}
        if measurement.case.tight and measurement.tool == "halfbyte":
            limit = self.unsloth_bytes(measurement.case.name)
            if limit is None:
                return line | {"error": "Unsloth's memory, which is the limit, was not measured"}
            spec["memory_limit_gb"] = round(limit / 1e9 - self.headroom_gb, 3)
        wall = measurement.case.kind == "wall"
        environment = self._peer_environment()
        if measurement.tool not in PEERS:
            environment = self._own_environment()
        caches = self.work / "caches"
        if wall:
            if measurement.case.cold:
                shutil.rmtree(caches, ignore_errors=True)
            elif not caches.exists():
                return line | {"error": "there is no filled cache: run recipe-cold before"}
            caches.mkdir(exist_ok=True)
            environment |= {name: str(caches / name.lower()) for name in CACHES}
            program = self._recipe_program(measurement)
        else:
            module = "peers.run_peer" if measurement.tool in PEERS else "peers.run_halfbyte"
            spec["mark"] = str(self.work / "logs" / f"{key.replace('/', '-')}.mark")
            Path(spec["mark"]).unlink(missing_ok=True)
            program = ["-m", module, json.dumps(spec)]
        left = self.left_s
        ended = self._start(key, program, environment, measurement.timeout_s, spec.get("mark"))
        line["process_s"] = round(ended.seconds, 2)
        if ended.code is None and left < measurement.timeout_s:
            return None
        line |= {"memory": ended.memory, "peak_bytes": self._peak(ended.memory)}
        result = self._wall_result(measurement, ended) if wall else last_json(ended.stdout)
        if ended.code != 0 or result is None:
            killed = f"killed after {ended.seconds:.0f} s; its last line: "
            return line | {"error": (killed if ended.code is None else "") + last_line(ended)}
        return line | result

    def unsloth_bytes(self, case: str) -> int | None:
        """The least that a round of Unsloth has taken in ``case``, less the context."""
        lines = [line for key, line in self.found.items() if key.startswith(f"{case}/unsloth/")]
        peaks = [line["peak_bytes"] for line in lines if "error" not in line]
        return min((p for p in peaks if p is not None), default=None)

    def _peak(self, memory: dict[str, Any]) -> int | None:
        context = self.found.get(CONTEXT)
        return None if context is None else peak_bytes(memory, context)

    # ---- the whole recipe --------------------------------------------------

    def _recipe_program(self, measurement: Measurement) -> list[str]:
        out = self._recipe_folder(measurement)
        shutil.rmtree(out, ignore_errors=True)
        changes = (
            f"model.name={self.work / 'model'}",
            f"data.path={self.data}",
            "quantization.double_quant=true",
        )
        program = ["-m", "halfbyte", "train", str(ROOT / "recipes" / "tinyllama-chatdoctor.yaml")]
        for change in changes:
            program += ["--set", change]
        return [*program, "--out", str(out)]

    def _recipe_folder(self, measurement: Measurement) -> Path:
        return self.work / "runs" / measurement.key.replace("/", "-")

    def _wall_result(self, measurement: Measurement, ended: Ended) -> dict[str, Any] | None:
        """What the run's own record says beside the seconds on the wall."""
        if ended.code != 0:
            return None
        events = []
        with suppress(OSError):
            text = (self._recipe_folder(measurement) / "events.jsonl").read_text(encoding="utf-8")
            events = [json.loads(line) for line in text.splitlines() if line.strip()]
        steps = [event for event in events if event["kind"] == "step"]
        return {
            "wall_s": ended.seconds,
            "steps": len(steps),
            "steps_s": sum(step["seconds"] for step in steps),
            "phases": {e["name"]: e["seconds"] for e in events if e["kind"] == "phase"},
            "said": [e["reason"] for e in events if e["kind"] == "fallback"],
        }

    # ---- processes ---------------------------------------------------------

    def _own_environment(self) -> dict[str, str]:
        hidden = ROOT / "benchmarks" / "peers" / "hidden"
        return self._environment([hidden, *self.own_path, ROOT / "benchmarks"])

    def _peer_environment(self) -> dict[str, str]:
        path = [*([self.site] if self.site else []), ROOT / "benchmarks"]
        return self._environment(path)

    def _environment(self, path: list[Path]) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        return {
            **kept,
            # As what pip has installed: an image without byte code compiles every module that is
            # imported, in each process again.
            "PYTHONPYCACHEPREFIX": str(self.work / "bytecode"),
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def _start(
        self,
        key: str,
        program: list[str],
        environment: dict[str, str],
        timeout_s: float,
        mark: str | None = None,
    ) -> Ended:
        """Run ``program`` to its end, or kill it and all that it started."""
        name = key.replace("/", "-")
        out, err = (self.work / "logs" / f"{name}.{end}" for end in ("out", "err"))
        baseline = self.driver.used()
        with out.open("wb") as out_file, err.open("wb") as err_file:
            began = time.perf_counter()
            process = subprocess.Popen(
                [*self.python, *program],
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
                env=environment,
                cwd=self.work,
                start_new_session=True,
            )
            sampler = MemorySampler(
                self.driver,
                process.pid,
                baseline,
                frozen=lambda: mark is not None and Path(mark).exists(),
            )
            sampler.start()
            killed = threading.Event()

            def kill() -> None:
                killed.set()
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

            timer = threading.Timer(max(1.0, min(timeout_s, self.left_s)), kill)
            timer.start()
            try:
                process.wait()
            except BaseException:
                kill()
                raise
            finally:
                timer.cancel()
            seconds = time.perf_counter() - began
        memory = sampler.stop()
        return Ended(
            None if killed.is_set() else process.returncode,
            out.read_text(encoding="utf-8", errors="replace"),
            err.read_text(encoding="utf-8", errors="replace"),
            seconds,
            memory,
        )


def read_measurements(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of ``path`` by their key, the last one of a key; a torn line is passed over."""
    found: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return found
    for text in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            line = json.loads(text)
            found[line["key"]] = line
    return found


def last_json(text: str) -> dict[str, Any] | None:
    """The last line of ``text`` that is a JSON object."""
    for line in reversed(text.splitlines()):
        with suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                return value
    return None


def last_line(ended: Ended) -> str:
    """What a failed process said last, for its record."""
    lines = [line.strip() for line in (ended.stderr or ended.stdout).splitlines() if line.strip()]
    return (lines[-1] if lines else f"nothing (exit code {ended.code})")[:500]


def brief(line: dict[str, Any]) -> str:
    if "error" in line:
        return f"FAILED: {line['error']}"
    if "wall_s" in line:
        return f"{line['wall_s']:.1f} s"
    peak = line["peak_bytes"]
    ms = sorted(line["ms"])[len(line["ms"]) // 2]
    return f"{ms:.2f} ms a step" + ("" if peak is None else f", {peak / 2**30:.2f} GiB")
