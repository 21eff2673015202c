"""What a run survives: faults put into real runs, and a table of what came of them.

After each fault the run goes on by ``--resume auto`` and must end with the very adapter of a run
that nothing happened to, with no damaged checkpoint under its own name, and nothing left behind.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from chaos_case import Ended, Lab, adapter_hash, checkpoints, has_event, has_step

# What went wrong at one injection, with where it was; None where the run survived.
Outcome = str | None
Case = Callable[[Lab, int], Iterator[Outcome]]  # the lab, and how many injections at most
WHOLE = 10**6  # injections: all there are


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of the numbers from 1 to ``count``, evenly."""
    if count <= most:
        return list(range(1, count + 1))
    return sorted({1 + round(at * (count - 1) / max(most - 1, 1)) for at in range(most)})


def at_calls(lab: Lab, most: int, code: int | str, *, stays: bool = False) -> Iterator[Outcome]:
    for at in spread(len(lab.calls), most):
        folder = lab.folder()
        ended = lab.train(folder, fault=lab.at_call(folder, at, code, stays=stays))
        wrong = lab.made_up_for(folder, ended)
        yield wrong and f"call {at} ({lab.calls[at - 1]}): {wrong}"
        shutil.rmtree(folder.parent)


def killed_at_calls(lab: Lab, most: int) -> Iterator[Outcome]:
    return at_calls(lab, most, "kill")


def killed_at_random(lab: Lab, most: int) -> Iterator[Outcome]:
    chance = random.Random(0)
    for _ in range(min(most, 50)):
        folder, after = lab.folder(), chance.uniform(0, 1.1 * lab.seconds)
        ended = lab.train(folder, after=after)
        wrong = lab.made_up_for(folder, ended)
        yield wrong and f"after {after:.3f} s: {wrong}"


def killed_again_and_again(lab: Lab, most: int) -> Iterator[Outcome]:
    """One run, whose every process is killed once it has made a checkpoint, or sooner."""
    chance = random.Random(1)
    for _ in range(min(most, 5)):
        folder = lab.folder()
        for _ in range(12):
            known = len(checkpoints(folder))
            ended = lab.train(
                folder,
                when=lambda folder=folder, known=known: len(checkpoints(folder)) > known,
                act=lambda: time.sleep(chance.uniform(0, 0.02)),
                fault=lab.at_call(folder, chance.randrange(1, len(lab.calls)), "kill"),
            )
            if ended.code == 0:
                break
        yield lab.made_up_for(folder, ended)


def asked_to_end(lab: Lab, most: int) -> Iterator[Outcome]:
    chance = random.Random(2)
    for number in range(min(most, 20)):
        folder = lab.folder()
        step = chance.randrange(1, 6)
        late = number % 2  # at a step, or any time
        if late:
            ended = lab.train(folder, after=chance.uniform(0, lab.seconds), number=signal.SIGTERM)
        else:
            ended = _signalled_at(lab, folder, step)
        # Before the run takes signals the system's own way of ending it holds; shells say 143 too.
        allowed = (0, 143, -15) if late or has_event(folder, "finished") else (143,)
        wrong = None if ended.code in allowed else f"code {ended.code}"
        if ended.code == 143 and not late and not checkpoints(folder):
            wrong = "no checkpoint was written"
        yield wrong or lab.made_up_for(folder, ended)


def _signalled_at(lab: Lab, folder: Path, step: int) -> Ended:
    pid = lab.begin(folder)
    while not has_step(folder, step):
        time.sleep(0.002)
    os.kill(pid, signal.SIGTERM)
    return lab.end(pid, folder)


def full_at_calls(lab: Lab, most: int) -> Iterator[Outcome]:
    return at_calls(lab, most, errno.ENOSPC, stays=True)


def full_once(lab: Lab, most: int) -> Iterator[Outcome]:
    return at_calls(lab, min(most, 90), errno.ENOSPC)


def broken_at_calls(lab: Lab, most: int) -> Iterator[Outcome]:
    return at_calls(lab, min(most, 40), errno.EIO)


def read_only_from_calls(lab: Lab, most: int) -> Iterator[Outcome]:
    return at_calls(lab, min(most, 40), errno.EROFS, stays=True)


def largest_files(lab: Lab, most: int) -> Iterator[Outcome]:
    """A limit of the system on the size of a file: a real refusal, of Rust's writes as well."""
    for size in [20_000, 30_000, 40_000, 50_000, 60_000, 100_000, 200_000][:most]:
        folder = lab.folder()
        ended = lab.train(folder, fault={"kind": "size", "bytes": size})
        wrong = lab.made_up_for(folder, ended)
        yield wrong and f"{size} bytes: {wrong}"


def full_disk(lab: Lab, most: int) -> Iterator[Outcome]:
    """A disk that is really full, and then not any more."""
    sizes = [16, 40, 80, 120, 160, 200, 240, 280, 320, 360, 400, 500, 600, 800]
    for kibibytes in [sizes[at - 1] for at in spread(len(sizes), most)]:
        folder = lab.folder()
        codes = folder.parent.parent / f"{folder.parent.name}.codes"
        pid = lab.begin(
            folder,
            disk=[kibibytes * 1024, 64 << 20],
            codes=str(codes),
            fault={"kind": "disk"},
            out=str(codes) + ".out",
        )
        lab._ask({"wait": pid})
        text = Path(f"{codes}.out.0")
        if not codes.exists():
            return  # this process may not mount
        first, second = (int(code) for code in re.findall(r"-?\d+", codes.read_text()))
        ended = Ended(first, text.read_text(errors="replace"))
        wrong = None
        if not ended.orderly:
            wrong = f"it ended with {first}: {ended.text.strip().splitlines()[-1:]}"
        elif second != 0:
            wrong = f"it did not go on: {Path(f'{codes}.out.1').read_text()[-300:]}"
        else:
            wrong = lab.unlike(Path(f"{codes}.folder") / "run")
        yield wrong and f"{kibibytes} KiB: {wrong}"


def vanished(lab: Lab, most: int) -> Iterator[Outcome]:
    """The run folder is renamed away (a disk that is unplugged), and comes back."""
    for step in spread(5, most):
        folder = lab.folder()
        away = folder.with_name("away")

        def act(folder: Path = folder, away: Path = away) -> None:
            if folder.exists():
                folder.rename(away)

        ended = lab.train(folder, when=lambda f=folder, s=step: has_step(f, s), act=act)
        wrong = None
        if ended.code == 0:
            wrong = "it ended as if nothing had happened"
        elif ended.code == 2 and len(ended.text.strip().splitlines()[-1]) > 400:
            wrong = "its last words are no sentence"
        shutil.rmtree(folder, ignore_errors=True)
        (away / "run.lock").unlink(missing_ok=True)  # its process could not
        away.rename(folder)
        yield wrong or lab.made_up_for(folder, ended)


def lock_lost(lab: Lab, most: int) -> Iterator[Outcome]:
    """Somebody removes run.lock: the run must not go on, for another one may."""
    for step in spread(4, most):
        folder = lab.folder()
        ended = lab.train(
            folder,
            when=lambda f=folder, s=step: has_step(f, s),
            act=lambda f=folder: (f / "run.lock").unlink(missing_ok=True),
        )
        wrong = None
        if ended.code != 2 or "was taken from this run" not in ended.text:
            wrong = f"code {ended.code}: {ended.text[-300:]}"
        yield wrong or lab.made_up_for(folder, ended)


def two_processes(lab: Lab, most: int) -> Iterator[Outcome]:
    for number in range(min(most, 10)):
        folder = lab.folder()
        outs = [folder.parent / f"out-{n}" for n in range(3)]
        pids = []
        for out in outs:
            pids.append(lab.begin(folder, out=str(out)))
            time.sleep(0.1 * (number % 4))
        (folder.parent / "terminal").touch()
        codes = [lab.end(pid, folder).code for pid in pids]
        texts = [out.read_text() for out in outs]
        wrong = None
        if sorted(codes, key=str) not in ([0, 2, 2], [0, 0, 2], [0, 0, 0]):
            wrong = f"codes {codes}: {[t.strip().splitlines()[-1:] for t in texts]}"
        for code, text in zip(codes, texts, strict=True):
            if code == 2 and "in use" not in text:
                wrong = f"refused for another reason: {text[-300:]}"
        yield wrong or lab.unlike(folder)


def only_the_mirror_left(lab: Lab, most: int) -> Iterator[Outcome]:
    for step in spread(5, most):
        folder = lab.folder()
        mirror = ("--mirror", str(folder.parent / "mirror"))
        there = folder.parent / "mirror" / "run"

        def seen(there: Path = there, step: int = step) -> bool:
            return len(checkpoints(there)) > (step > 3)

        ended = _killed_when(lab, folder, seen, mirror)
        shutil.rmtree(folder)
        wrong = lab.made_up_for(folder, ended, *mirror)
        if not wrong and "from the mirror" not in (folder / "events.jsonl").read_text():
            wrong = "it began again"
        if not wrong and adapter_hash(there) != lab.reference:
            wrong = "the mirror has another adapter"
        yield wrong


def _killed_when(lab: Lab, folder: Path, seen: Callable[[], bool], more: tuple[str, ...]) -> Ended:
    pid = lab.begin(folder, *more)
    while not seen():
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return lab.end(pid, folder)


def killed_while_mirroring(lab: Lab, most: int) -> Iterator[Outcome]:
    """Calls on the run and on the mirror, then only what the mirror holds is left."""
    for at in spread(2 * len(lab.calls), min(most, 60)):
        folder = lab.folder()
        mirror = ("--mirror", str(folder.parent / "mirror"))
        ended = lab.train(folder, *mirror, fault=lab.at_call(folder, at, "kill"))
        shutil.rmtree(folder, ignore_errors=True)
        wrong = lab.made_up_for(folder, ended, *mirror)
        yield wrong and f"call {at}: {wrong}"


def mirror_lost(lab: Lab, most: int) -> Iterator[Outcome]:
    """The mirror is renamed away while a checkpoint is copied; the run must not care."""
    for number in range(min(most, 10)):
        folder = lab.folder()
        mirror = folder.parent / "mirror"

        def seen(mirror: Path = mirror, number: int = number) -> bool:
            return len(list(mirror.glob("run/checkpoints/*"))) > number % 2

        def act(mirror: Path = mirror) -> None:
            if mirror.exists():
                mirror.rename(mirror.with_name("gone"))

        ended = lab.train(folder, "--mirror", str(mirror), when=seen, act=act)
        wrong = None
        if ended.code != 0:
            wrong = f"the run ended with {ended.code}: {ended.text[-300:]}"
        elif "the mirror" not in ended.text:
            wrong = "nothing was said of it"
        yield wrong or lab.unlike(folder)


def jumping_clock(lab: Lab, most: int) -> Iterator[Outcome]:
    clock = {"kind": "clock"}
    for number in range(min(most, 6)):
        folder = lab.folder()
        if number:
            step = 1 + number % 5
            pid = lab.begin(folder, fault=clock)
            while not has_step(folder, step):
                time.sleep(0.002)
            os.kill(pid, signal.SIGKILL)
            lab.end(pid, folder)
        ended = lab.train(folder, fault=clock)
        yield (
            f"it ended with {ended.code}: {ended.text[-300:]}" if ended.code else lab.unlike(folder)
        )


def _interrupted(lab: Lab) -> Path:
    """A run that was killed with two checkpoints."""
    folder = lab.folder()
    _killed_when(lab, folder, lambda: len(checkpoints(folder)) >= 2, ())
    return folder


def torn_record(lab: Lab, most: int) -> Iterator[Outcome]:
    """events.jsonl is cut anywhere, as where a disk lost its last blocks."""
    begun, chance = _interrupted(lab), random.Random(3)
    size = (begun / "events.jsonl").stat().st_size
    for number in range(min(most, 12)):
        folder = lab.folder()
        shutil.copytree(begun, folder)
        at = [size - 1, size - 20, 0][number] if number < 3 else chance.randrange(size)
        os.truncate(folder / "events.jsonl", at)
        wrong = lab.made_up_for(folder, Ended(0, ""))
        yield wrong and f"cut at byte {at}: {wrong}"


def damaged_checkpoint(lab: Lab, most: int) -> Iterator[Outcome]:
    """One bit is flipped, the end is lost, or the file is; each of the newest checkpoint's."""
    begun, chance = _interrupted(lab), random.Random(4)
    newest = checkpoints(begun)[-1]
    files = sorted(p.relative_to(begun) for p in newest.rglob("*") if p.is_file())
    ways = [(file, way) for way in ("bit", "end", "file") for file in files]
    for file, way in [ways[at - 1] for at in spread(len(ways), most)]:
        folder = lab.folder()
        shutil.copytree(begun, folder)
        data = bytearray((folder / file).read_bytes())
        if way == "bit":
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        # A line break at the end of a manifest may go without harm; what is before it may not.
        (folder / file).write_bytes(data[:-2] if way == "end" else data)
        if way == "file":
            (folder / file).unlink()
        ended = lab.train(folder)
        wrong = f"code {ended.code}: {ended.text[-300:]}" if ended.code else lab.unlike(folder)
        if not wrong and newest.name not in ended.text:
            wrong = "nothing was said of it"
        yield wrong and f"{way} of {file}: {wrong}"


CASES: dict[str, Case] = {
    "killed at each call to the disk": killed_at_calls,
    "killed at a random moment": killed_at_random,
    "killed again and again": killed_again_and_again,
    "SIGTERM": asked_to_end,
    "disk full from one call on": full_at_calls,
    "disk full at one call": full_once,
    "disk error at one call": broken_at_calls,
    "read-only from one call on": read_only_from_calls,
    "largest size of a file": largest_files,
    "a small disk, really full": full_disk,
    "run folder vanishes": vanished,
    "run.lock removed": lock_lost,
    "three processes on one folder": two_processes,
    "only the mirror is left": only_the_mirror_left,
    "killed while mirroring, folder lost": killed_while_mirroring,
    "mirror vanishes while it is copied to": mirror_lost,
    "clock jumps": jumping_clock,
    "record cut in the middle": torn_record,
    "newest checkpoint damaged": damaged_checkpoint,
}


def table(lab: Lab, part: str) -> list[str]:
    """Inject every fault whose name has ``part`` and print the table; returns what was lost."""
    began, lost, rows = time.monotonic(), [], []
    for name, case in CASES.items():
        if part not in name:
            continue
        outcomes = list(case(lab, WHOLE))
        wrong = [f"{name}: {text}" for text in outcomes if text is not None]
        lost += wrong
        rows.append((name, len(outcomes), len(outcomes) - len(wrong), len(wrong)))
        print(_line(*rows[-1]), *wrong, sep="\n", flush=True)
        if "CHAOS_RECORD" in os.environ:
            _record(rows)
    print("", _line("fault", "injected", "survived", "lost"), sep="\n")
    for row in [*rows, ("all", *(sum(row[n] for row in rows) for n in (1, 2, 3)))]:
        print(_line(*row))
    print(f"{time.monotonic() - began:.0f} s; {len(lab.calls)} calls to the disk in a run")
    return lost


def _record(rows: list[tuple[str, int, int, int]]) -> None:
    """Write benchmarks/results/chaos.json, or the lines of it that were made again."""
    benchmarks = Path(__file__).resolve().parent.parent / "benchmarks"
    sys.path.insert(0, str(benchmarks))
    from record import write_results

    path = benchmarks / "results" / "chaos.json"
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    made = {row[0] for row in rows}
    kept = [row for row in known if row["case"] in CASES and row["case"] not in made]
    new = [
        {"case": name, "tool": "halfbyte", "metric": metric, "value": value, "unit": "runs"}
        for name, *values in rows
        for metric, value in zip(("injected", "survived", "lost"), values, strict=True)
    ]
    order = list(CASES)
    write_results(
        "chaos",
        sorted([*kept, *new], key=lambda row: order.index(row["case"])),
        command="make chaos CHAOS_RECORD=1",
    )


def _line(name: str, *figures: object) -> str:
    return f"{name:40}" + "".join(f"{figure!s:>10}" for figure in figures)
