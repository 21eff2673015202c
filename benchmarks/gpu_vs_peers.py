"""halfbyte against the usual QLoRA tools on one NVIDIA GPU, in one run.

    python benchmarks/gpu_vs_peers.py --data chatdoctor.json --tokenizer tokenizer.model \\
        --site FOLDER --workdir DIR [--cases NAME ...] [--budget-s 560] [--out FILE]
    python benchmarks/gpu_vs_peers.py --summarise --workdir DIR [--out FILE]

The TinyLlama recipe with random weights of the right shape, double quantization in all tools: TRL +
PEFT + bitsandbytes, the same with Liger's kernels, and Unsloth, each in processes of its own that
alternate with halfbyte's. Each finished measurement is a line of DIR/measurements.jsonl; what is
there is not measured again, so that a second command goes on. At the end the results file is
written and a table printed; peers/README.md says what the figures mean and how to carry the peers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from peers.cases import BY_NAME_ONLY, CASES, measurements
from peers.runner import FILE_NAME, ROOT, Runner, read_measurements
from peers.summary import result_rows, table, versions
from record import command_typed, commit_here, write_results

# Kept for the summary at the end, which takes no GPU.
CLOSING_S = 5.0


def main(words: Sequence[str] | None = None, python: list[str] | None = None) -> int:
    """``python`` starts every process; a test puts a stand-in there. Returns the exit code."""
    args = parse(words)
    work = args.workdir.resolve()
    if args.summarise:
        return conclude(work, args.out)
    deadline = time.monotonic() + args.budget_s - CLOSING_S
    names = args.cases or [name for name in CASES if name not in BY_NAME_ONLY]
    wanted = [
        measurement
        for measurement in measurements(names, args.rounds, args.steps)
        if args.tools is None or measurement.tool in args.tools
        if args.profiles or not measurement.profile
    ]
    runner = Runner(
        work=work,
        data=args.data.resolve(),
        tokenizer=args.tokenizer.resolve(),
        site=args.site.resolve() if args.site else None,
        own_path=[path.resolve() for path in args.halfbyte_path],
        python=python or [sys.executable],
        headroom_gb=args.headroom_gb,
        deadline=deadline,
        retry=args.retry,
    )
    if all(runner.is_done(m.key) for m in wanted):
        return conclude(work, args.out)
    typed, commit, day = command_typed(), commit_here(), date.today().isoformat()
    session = {"command": typed, "commit": commit, "date": day}
    runner.keep({"key": f"command {time.time():.3f}", **session})
    wrong = runner.prepare(wanted)
    if wrong is not None:
        print(f"gpu_vs_peers: {wrong}", file=sys.stderr)
        return 2
    late = runner.run_all(wanted)
    code = conclude(work, args.out)
    if late:
        print(f"not measured for lack of time, run again: {', '.join(late)}")
    return code


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="JSON rows: ChatDoctor's")
    parser.add_argument("--tokenizer", type=Path, help="Llama's tokenizer.model")
    parser.add_argument("--site", type=Path, help="folder of the peers' packages")
    parser.add_argument(
        "--halfbyte-path",
        type=Path,
        nargs="*",
        default=[p for p in (ROOT / "src", ROOT / ".carry" / "site") if p.exists()],
        help="folders of halfbyte and its packages; by default src, and .carry/site if there",
    )
    parser.add_argument("--workdir", type=Path, required=True, help="model, rows, logs, figures")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), metavar="CASE")
    parser.add_argument("--tools", nargs="+", metavar="TOOL", help="by default all of a case")
    parser.add_argument(
        "--no-profiles", dest="profiles", action="store_false", help="no step of halfbyte profiled"
    )
    parser.add_argument("--rounds", type=int, default=2, help="processes of each tool and case")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of a peer's process")
    parser.add_argument("--budget-s", type=float, default=1e9, help="start nothing that ends later")
    parser.add_argument(
        "--headroom-gb", type=float, default=0.0, help="off the limit of halfbyte's tight case"
    )
    parser.add_argument("--retry", action="store_true", help="do failed measurements again")
    parser.add_argument("--summarise", action="store_true", help="only write the results again")
    parser.add_argument("--out", type=Path, help="results file; benchmarks/results/ by default")
    args = parser.parse_args(words)
    if args.rounds < 1 or args.steps < 1:
        parser.error("--rounds and --steps must be at least 1")
    if not args.summarise:
        for name in ("data", "tokenizer"):
            path = getattr(args, name)
            if path is None or not path.is_file():
                parser.error(f"--{name} must name a file")
        if args.site is not None and not args.site.is_dir():
            parser.error("--site must name a folder")
    return args


def conclude(work: Path, out: Path | None) -> int:
    """Write the results file and print the table."""
    found = read_measurements(work / FILE_NAME)
    rows = result_rows(found)
    if not rows:
        print("gpu_vs_peers: there are no measurements to summarise", file=sys.stderr)
        return 2
    sessions = [line for key, line in found.items() if key.startswith("command ")]
    write_results(
        "gpu_vs_peers",
        rows,
        device=next((line["gpu"] for line in found.values() if line.get("gpu")), "unknown"),
        versions=versions(found),
        path=out,
        command=" && ".join(dict.fromkeys(line["command"] for line in sessions)) or None,
        commit=" ".join(dict.fromkeys(line["commit"] for line in sessions if line["commit"])),
        day=sessions[-1]["date"] if sessions else None,
    )
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
