"""What is fuzzed: for each kind of input the real files, how they are changed, and the command.

``Place`` is a working directory with a small model, rows and a run of it. Every input is one file
of it, or a folder's, changed; a command is typed; and what is wrong with how that ended is told.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from types import FrameType

import pyarrow
import pyarrow.parquet
import yaml
from typer.testing import CliRunner

from fuzz_mutation import (
    bytes_changed,
    json_changed,
    jsonl_changed,
    safetensors_changed,
    text_changed,
    value_changed,
)
from halfbyte.cli.app import app
from safety_case import RECIPE

LONGEST = 30.0  # seconds that a command may take


class Hangs(BaseException):
    """A command that takes longer than any of these does."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with how a command ended; ``where`` tells like faults from others."""

    where: str
    detail: str


@dataclass
class Place:
    folder: Path
    seeds: dict[str, dict[str, bytes]] = field(default_factory=dict)  # kind: file: content


Changed = Callable[[bytes, Random], bytes]

CHANGES: dict[str, Changed] = {
    ".json": json_changed,
    ".jsonl": jsonl_changed,
    ".safetensors": safetensors_changed,
    ".yaml": text_changed,
    ".csv": text_changed,
    ".tsv": text_changed,
    ".jinja": text_changed,
    ".parquet": bytes_changed,
    ".arrow": bytes_changed,
    ".gguf": lambda whole, rng: bytes_changed(whole[:1500], rng) + whole[1500:],
}

RICH = """\
title: A run
author: somebody
seed: 7
device: cpu
precision: fp32
model: {name: ./model, new_tokens: ["<x>"]}
data:
  path: rows.jsonl
  columns: {instruction: instruction, input: input, output: output}
  template: "Q: {instruction}\\nC: {input}\\nA: {output}"
  held_out: 4
  max_length: 128
  cleaning:
    - {filter: exact_duplicates, by: question}
    - {filter: length, answer_min_words: 1, answer_max_characters: 9000}
    - {filter: pattern, replace: "a+b", replacement: c}
    - {filter: script, allow: [Latin]}
quantization: {double_quant: true, block_size: 64}
lora: {r: 8, lora_alpha: 16, lora_dropout: 0.1, target_modules: [q_proj, v_proj]}
training:
  epochs: 1
  batch_size: 2
  learning_rate: 2e-4
  lr_scheduler: cosine
  warmup_steps: 1
checkpoints: {every_steps: 1, keep_last: 2}
evaluation: {prompts: 1, max_new_tokens: 4}
"""


def make_place(folder: Path, model: Path, rows: Path, gguf: Path | None = None) -> Place:
    """The directory, which becomes the working directory; nothing outside it is written to."""
    shutil.copytree(model, folder / "model")
    shutil.copy(rows, folder / "rows.jsonl")
    (folder / "recipe.yaml").write_text(RECIPE + "checkpoints: {every_steps: 1, keep_last: 9}\n")
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.environ.pop("TMPDIR", None)
    _light()
    for out, more in (("run", []), ("stopped", ["--max-steps", "2"])):
        ended = CliRunner().invoke(app, ["train", "recipe.yaml", "--out", out, *more])
        if ended.exception is not None:
            raise ended.exception
    # What is changed is right before: else nothing behind its first fault would be seen.
    (folder / "rich.yaml").write_text(RICH)
    ended = CliRunner().invoke(app, ["recipe", "rich.yaml"])
    assert ended.exit_code == 0, ended.output
    # A run that was stopped: its second checkpoint and what followed it are gone.
    shutil.rmtree(folder / "stopped" / "checkpoints" / "step-2")
    shutil.rmtree(folder / "stopped" / "adapter")
    record = (folder / "stopped" / "events.jsonl").read_text().splitlines(keepends=True)
    begun = [line for line in record if '"kind": "finished"' not in line]
    (folder / "stopped" / "events.jsonl").write_text("".join(begun))
    place = Place(folder)
    place.seeds = {
        "recipe": {"recipe.yaml": RECIPE.encode(), "rich.yaml": RICH.encode()},
        "rows": dict(_tables(rows)),
        "record": {"run/events.jsonl": (folder / "run" / "events.jsonl").read_bytes()},
        "adapter": _files(folder, "run/adapter", ("README.md",)),
        "model": _files(folder, "model", ("generation_config.json",)),
        "checkpoint": {
            **_files(folder, "stopped/checkpoints/step-1", ()),
            **_files(folder, "stopped", ("report.md", "report.html"), deep=False),
        },
    }
    if gguf is not None:
        place.seeds["GGUF"] = {"model.gguf": gguf.read_bytes()}
    return place


def _light() -> None:
    """Leave out what takes long and reads nothing of an input: pictures, a model of languages."""
    import halfbyte.data.cleaning.language as language
    from quick_plots import leave_out_pictures

    cached = lru_cache(language._identifier)
    language._identifier = lambda languages: cached(tuple(languages))  # type: ignore[assignment]
    leave_out_pictures()


def _files(
    folder: Path, under: str, without: tuple[str, ...], deep: bool = True
) -> dict[str, bytes]:
    paths = (folder / under).rglob("*") if deep else (folder / under).glob("*")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(paths)
        if path.is_file() and path.name not in without
    }


def _tables(rows: Path) -> Iterator[tuple[str, bytes]]:
    """The rows in every format, instructions and conversations."""
    plain = [json.loads(line) for line in rows.read_text().splitlines()]
    spoken = [
        {
            "messages": [
                {"role": "system", "content": "Count."},
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"], "weight": 1},
            ],
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
            ],
        }
        for row in plain
    ]
    lines = "".join(json.dumps(row) + "\n" for row in plain).encode()
    yield "rows.jsonl", lines
    yield "spoken.jsonl", "".join(json.dumps(row) + "\n" for row in spoken).encode()
    yield "rows.json", json.dumps(plain).encode()
    yield "spoken.json", json.dumps({"rows": spoken}).encode()
    for ending, mark in (("csv", ","), ("tsv", "\t")):
        cells = [[json.dumps(cell) for cell in row.values()] for row in plain]
        text = "\n".join(mark.join(row) for row in [list(plain[0]), *cells]) + "\n"
        yield f"rows.{ending}", text.encode()
    yield "rows.jsonl.gz", gzip.compress(lines)
    yield "rows.jsonl.zst", pyarrow.compress(lines, "zstd", asbytes=True)
    for name, table in (
        ("rows", pyarrow.Table.from_pylist(plain)),
        ("spoken", pyarrow.Table.from_pylist(spoken)),
    ):
        for ending, opened in (
            ("file.arrow", pyarrow.ipc.new_file),
            ("stream.arrow", pyarrow.ipc.new_stream),
        ):
            sink = pyarrow.BufferOutputStream()
            with opened(sink, table.schema) as writer:
                writer.write_table(table)
            yield f"{name}.{ending}", sink.getvalue().to_pybytes()
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink)
        yield f"{name}.parquet", sink.getvalue().to_pybytes()


def one_input(place: Place, kind: str, rng: Random) -> Fault | None:
    """Change a file of ``kind`` by chance, type a command, and tell what is wrong with its end."""
    seeds = place.seeds[kind]
    name = rng.choice(sorted(seeds))
    content = _change(name, seeds[name], rng)
    path = place.folder / name
    if kind == "checkpoint":  # going on writes into the run
        shutil.rmtree("again", ignore_errors=True)
        shutil.copytree("stopped", "again")
        path = place.folder / name.replace("stopped/", "again/", 1)
    path.write_bytes(content)
    if kind == "checkpoint" and "/step-1/" in name and rng.random() < 0.6:
        _list_again(path.parent)
    try:
        return ending(_words(kind, name, rng), rng)
    finally:
        if kind != "checkpoint":
            if kind in ("recipe", "rows", "GGUF") and name not in ("rows.jsonl", "recipe.yaml"):
                path.unlink()
            else:
                path.write_bytes(seeds[name])
            shutil.rmtree("new", ignore_errors=True)
            Path("new.yaml").unlink(missing_ok=True)


def _change(name: str, whole: bytes, rng: Random) -> bytes:
    if rng.random() < 0.02:
        return rng.randbytes(rng.choice([0, 1, 20, 2000]))
    if name.endswith(".yaml") and rng.random() < 0.6:
        text = yaml.safe_dump(value_changed(yaml.safe_load(whole), rng), allow_unicode=True)
        return text.encode("utf-8", "surrogatepass")
    if name.endswith((".gz", ".zst")) and rng.random() < 0.7:
        inside = gzip.decompress(whole) if name.endswith(".gz") else _unpacked(whole)
        changed = jsonl_changed(inside, rng)
        if name.endswith(".gz"):
            return gzip.compress(changed)
        return bytes(pyarrow.compress(changed, "zstd", asbytes=True))
    return CHANGES.get(Path(name).suffix, bytes_changed)(whole, rng)


def _unpacked(whole: bytes) -> bytes:
    with pyarrow.input_stream(pyarrow.BufferReader(whole), compression="zstd") as stream:
        return bytes(stream.read())


def _list_again(folder: Path) -> None:
    """As if whoever changed a file of the checkpoint had made a manifest of it."""
    import hashlib

    if folder.name != "step-1" or not (folder / "manifest.json").exists():
        return
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": digest,
        }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def _words(kind: str, name: str, rng: Random) -> list[str]:
    dry = ["train", "--dry-run", "--out", "new"]
    match kind:
        case "recipe":
            return rng.choice([["recipe", name], ["data", name], [*dry, name]])
        case "rows":
            data = ["data", "recipe.yaml", "--set", f"data.path={name}"]
            return rng.choice([["init", name, "--out", "new.yaml"], data])
        case "record":
            more = ["report", "run", "stopped"], ["status", "run", "--json"]
            return rng.choice([["report", "run"], ["report", "run"], *more])
        case "adapter":
            return ["chat", "run"]
        case "model":
            return rng.choice([[*dry, "recipe.yaml"], ["data", "recipe.yaml"]])
        case "GGUF":
            return [*dry, "recipe.yaml", "--model", "model.gguf"]
        case "checkpoint":
            return ["train", "--resume", "again"]
    raise ValueError(kind)


@contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    def over(_: int, frame: FrameType | None) -> None:
        raise Hangs("".join(traceback.format_stack(frame)[-6:]))

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ending(words: list[str], rng: Random | None = None) -> Fault | None:
    """Type ``words``; what is wrong with the end: a traceback, a hang, no sentence, half a file."""
    try:
        with no_longer_than(LONGEST):
            result = CliRunner().invoke(app, words, input="Hello\n")
    except Hangs as hangs:
        return Fault(f"{words[0]}: hangs", str(hangs))
    error = result.exception
    if isinstance(error, Hangs):
        return Fault(f"{words[0]}: hangs", str(error))
    if error is not None and not isinstance(error, SystemExit):
        return Fault(_place_of(error), "".join(traceback.format_exception(error))[-6000:])
    wrong = _wrong_end(words, result.exit_code, result.stderr)
    left = [p for p in Path().rglob("*") if "partial" in p.name and "cache" not in p.parts]
    if wrong is None and left:
        wrong = f"half a file is left: {left[0]}"
    if wrong is None and result.exit_code == 2 and (Path("new.yaml").exists() or _holds("new")):
        wrong = "it was refused and has written"
    return None if wrong is None else Fault(f"{words[0]}: {wrong.split(':')[0]}", wrong)


def _holds(folder: str) -> bool:
    return any(path.is_file() for path in Path(folder).rglob("*"))


def _wrong_end(words: list[str], code: int, said: str) -> str | None:
    if code == 0 or (code == 1 and words[0] in ("data", "init", "status")):
        return None
    if code != 2:
        return f"exit code {code}: {said[-500:]}"
    lines = [line for line in said.splitlines() if line.startswith("halfbyte: ")]
    if not lines:
        return f"no sentence: {said[-500:]}"
    if said.splitlines()[-1] not in lines or len(lines) > 1:
        return f"more than a sentence: {said[-800:]}"
    if not lines[-1].rstrip().endswith((".", "?", "…", "…)", ")")):
        return f"no end of a sentence: {lines[-1][-300:]}"
    if re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", lines[-1]):
        return f"an escape on the terminal: {lines[-1]!r}"
    return None


def _place_of(error: BaseException) -> str:
    """The class of an error and the line of halfbyte's that it came through last."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/halfbyte/" in frame.filename]
    last = ours[-1] if ours else frames[-1]
    name = last.filename.rpartition("/halfbyte/")[2]
    return f"{type(error).__name__} in {name}:{last.lineno} {last.name}"
