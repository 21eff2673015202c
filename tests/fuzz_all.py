"""``make fuzz``: some ten thousand files made wrong, and what the commands say to each.

Every input must give a result or one sentence with exit code 2: no traceback, no hang, no half of
a file. Prints a table of what was tried and what was found; exit code 1 where anything was.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shlex
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "benchmarks")]

# Of a hundred inputs so many are of each kind.
SHARES = {
    "recipe": 30,
    "rows": 38,
    "record": 14,
    "model": 10,
    "GGUF": 4,
    "adapter": 3,
    "checkpoint": 1,
}
MEMORY = 8 << 30  # bytes that a process may add


def work(number: int, workers: int, count: int, seed: int, results: object) -> None:
    """The inputs of one process; (kind, seed, fault) of each fault and the counts at the end."""
    from fuzz_kinds import make_place, one_input
    from fuzz_seeds import small_gguf, small_model, small_rows

    with tempfile.TemporaryDirectory(prefix="halfbyte-fuzz-") as base:
        folder = Path(base)
        model, rows = small_model(folder / "seed"), small_rows(folder / "rows")
        (folder / "place").mkdir()
        place = make_place(folder / "place", model, rows, small_gguf(folder / "small.gguf"))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
        kinds = [kind for kind, share in SHARES.items() for _ in range(share)]
        for n in range(number, count, workers):
            kind = kinds[n % len(kinds)] if count >= len(kinds) else Random(n).choice(kinds)
            one = seed * 10_000_000 + n
            fault = one_input(place, kind, Random(one))
            results.put((kind, one, fault))  # type: ignore[attr-defined]
        os.chdir("/")
    results.put(None)  # type: ignore[attr-defined]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/fuzz.json")
    asked = parser.parse_args()
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    children = [
        context.Process(target=work, args=(n, asked.workers, asked.count, asked.seed, results))
        for n in range(asked.workers)
    ]
    for child in children:
        child.start()
    tried: Counter[str] = Counter()
    faults: dict[str, dict[str, list[tuple[int, str]]]] = {kind: {} for kind in SHARES}
    running = len(children)
    while running:
        try:
            found = results.get(timeout=60)
        except Exception:
            if not any(child.is_alive() for child in children):
                print("a process ended before its inputs did", file=sys.stderr)
                return 1
            continue
        if found is None:
            running -= 1
            continue
        kind, one, fault = found
        tried[kind] += 1
        if fault is not None:
            like = faults[kind].setdefault(fault.where, [])
            like.append((one, fault.detail))
            if len(like) == 1:
                print(f"\n{kind}, seed {one}: {fault.where}\n{fault.detail}", flush=True)
        if tried.total() % 500 == 0:
            print(
                f"{tried.total():,} of {asked.count:,}, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    print(f"\n{'kind':<12} {'inputs':>8} {'errors found':>13}")
    for kind in SHARES:
        print(f"{kind:<12} {tried[kind]:>8,} {len(faults[kind]):>13,}")
    print(f"{'all':<12} {tried.total():>8,} {sum(map(len, faults.values())):>13,}")
    for kind, places in faults.items():
        for where, like in places.items():
            print(f"{kind}: {where}, {len(like)} times, as with seed {like[0][0]}")
    if asked.record:
        _record(tried, faults, time.monotonic() - began)
    return int(any(faults.values()))


def _record(
    tried: Counter[str], faults: dict[str, dict[str, list[tuple[int, str]]]], seconds: float
) -> None:
    from record import write_results

    rows = []
    for kind in SHARES:
        for metric, value in (("inputs", tried[kind]), ("errors found", len(faults[kind]))):
            rows.append(
                {"case": kind, "tool": "halfbyte", "metric": metric, "value": value, "unit": ""}
            )
    rows.append(
        {"case": "all", "tool": "halfbyte", "metric": "time", "value": round(seconds), "unit": "s"}
    )
    words = shlex.join(sys.argv[1:])
    write_results("fuzz", rows, command=f"make fuzz FUZZ_ARGS={shlex.quote(words)}")


if __name__ == "__main__":
    sys.exit(main())
