"""Where the time of the captured step goes, part by part.

    python benchmarks/step_profile.py --data chatdoctor.json --tokenizer tokenizer.model \\
        --model DIR [--variant free tight t4] [--write]

Runs the TinyLlama recipe's step (double quantization) as ``halfbyte train`` would, on a random
model of the right shape in DIR, which is made if it is not there. Of each variant it times eager
steps and captured ones, then profiles ten captured ones, all of batches that fall into one bucket,
that of the median batch. Kernels are told apart by their names and their place in the step
(forward, backward, update), and grouped into the parts that floors.py counts.

``free`` keeps the dequantized weights and recomputes nothing; ``tight`` is planned for 1.3 GB;
``t4`` is ``free`` in fp16 with the kernels and the memory of a T4. ``--write`` writes
results/step_profile.json; performance_tables.py puts its figures into docs/performance.md.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import floors
from record import ROOT, write_results

BASE = (
    "quantization.double_quant=true",
    "evaluation.prompts=0",
    "evaluation.base_loss=false",
    "data.held_out=4",
)
VARIANTS = {
    "free": ("training.gradient_checkpointing=false",),
    "tight": ("memory_limit_gb=1.3",),
    "t4": ("precision=fp16", "training.gradient_checkpointing=false"),
}
EAGER, WARMUP, TIMED, PROFILED = 8, 5, 60, 10
OTHER = "PyTorch's own passes"

# Kernels by the beginning of their names; what is not here is told by its place.
_NAMES = (
    ("_rms_norm", floors.NORMS),
    ("_rope", floors.ROTARY),
    ("_gated", floors.GATED),
    ("lora_", floors.THIN),
    ("sum_down_kernel", floors.THIN),
    ("sum_grads_kernel", floors.THIN),
    ("_apply_dropout", floors.THIN),
    ("forward_kernel", floors.ATTENTION),
    ("backward_kernel", floors.ATTENTION),
    ("delta_kernel", floors.ATTENTION),
    ("sum_parts_kernel", floors.ATTENTION),
    ("fmha", floors.ATTENTION),
    ("_cross_entropy_rows", floors.HEAD),
    ("_nf4_dequantize", floors.WEIGHTS),
    ("fold_b_kernel", floors.WEIGHTS),
    ("_adamw", floors.OPTIMIZER),
    ("_dropout_keys", floors.INPUT),
)
_PRODUCTS = ("nvjet", "gemm", "gemv", "cublas")
_OF_PRODUCTS = ("splitk", "memset")  # what a product launches before and after itself


def parts_of(names: Sequence[str], layers: int) -> list[str]:
    """The part of each kernel of some steps, in the order of their start.

    A step begins with a copy from the host. Products next to the cross-entropy are the head's;
    those before it are forward, those after it backward (or forward again, for the backward pass).
    After the last norm's backward kernel comes the update.
    """
    found: list[str] = []
    place, norms = "input", 0
    for at, name in enumerate(names):
        if name.startswith("Memcpy HtoD"):
            place, norms = "input", 0
        elif name.startswith("_rms_norm_backward"):
            norms += 1
        elif name.startswith("_rms_norm") and place == "input":
            place = "forward"
        elif name.startswith("_cross_entropy_rows"):
            place = "head"
        found.append(_part(names, at, place))
        if name.startswith("_rms_norm_backward"):
            place = "update" if norms == 2 * layers + 1 else "backward"
    return found


def _part(names: Sequence[str], at: int, place: str) -> str:
    name = names[at]
    for start, part in _NAMES:
        if name.startswith(start):
            return part
    by_place = {"input": floors.INPUT, "update": floors.OPTIMIZER}
    if place in by_place:
        return by_place[place]
    if _has(name, _PRODUCTS + _OF_PRODUCTS):
        near = [
            next((n for n in side if not _has(n, _OF_PRODUCTS)), "")
            for side in (reversed(names[:at]), iter(names[at + 1 :]))
        ]
        if any(n.startswith("_cross_entropy_rows") for n in near):
            return floors.HEAD
        return floors.FORWARD if place == "forward" else floors.BACKWARD
    return floors.HEAD if place == "head" else OTHER


def _has(name: str, words: Sequence[str]) -> bool:
    return any(word in name.lower() for word in words)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="JSON rows: ChatDoctor's")
    parser.add_argument("--tokenizer", type=Path, required=True, help="Llama's tokenizer.model")
    parser.add_argument("--model", type=Path, required=True, help="folder of the random model")
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    if not args.model.exists():
        from gpu_recipe import make_model

        make_model(args.model, args.tokenizer)
    rows = []
    # The T4's limit of memory holds for the rest of the process.
    for variant in sorted(args.variant, key=list(VARIANTS).index):
        found = measure(variant, args.model, args.data)
        gc.collect()  # a captured step and its graphs refer to one another
        torch.cuda.empty_cache()
        print_variant(variant, found)
        rows += list(result_rows(variant, found))
    if args.write:
        write_results("step_profile", rows, device=torch.cuda.get_device_name())


def measure(variant: str, model: Path, data: Path) -> dict[str, Any]:
    """Times and kernels of the steps of one variant."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from halfbyte import Recipe
    from halfbyte.run.assembly import assemble
    from halfbyte.run.record import RunRecord
    from halfbyte.run.training import _own_stream, _prepare, _same_bits

    if variant == "t4":
        os.environ["HALFBYTE_PROXY"] = "t4"
    with profile(activities=[ProfilerActivity.CUDA]):
        # A graph captured before the profiler's library is loaded is not seen by it.
        torch.zeros(1, device="cuda")
    said: list[str] = []
    record = RunRecord([lambda event: said.append(str(event)) if _matters(event) else None])
    recipe = Recipe.load(
        ROOT / "recipes" / "tinyllama-chatdoctor.yaml",
        [f"model.name={model}", f"data.path={data}", *BASE, *VARIANTS[variant]],
    )
    assembly = assemble(recipe, record)
    steps = _equal_steps(assembly)

    def run(step: Any, count: int) -> list[float]:
        done = []
        for number in [next(steps) for _ in range(count)]:
            done.append(step(number, assembly.batches.step(number)))
        torch.cuda.synchronize()
        return [seconds * 1e3 for one in done if (seconds := one.seconds()) is not None]

    with _same_bits(assembly), _own_stream(assembly):
        trainer = _prepare(assembly, record, None)
        if trainer.take_step is trainer.step or trainer.model.fused is None:
            raise SystemExit(f"the step was not fused and captured: {said}")
        eager = run(trainer.step, EAGER)
        run(trainer.take_step, WARMUP)
        timed = run(trainer.take_step, TIMED)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run(trainer.take_step, PROFILED)
    kernels = sorted(
        (e.time_range.start, e.name, e.time_range.elapsed_us())
        for e in profiler.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    )
    layers = trainer.model.fused.layers
    parts: dict[str, tuple[int, float]] = {}
    of_other: dict[str, float] = {}
    found = parts_of([name for _, name, _ in kernels], len(layers))
    for part, (_, name, us) in zip(found, kernels, strict=True):
        count, total = parts.get(part, (0, 0.0))
        parts[part] = (count + 1, total + us)
        if part == OTHER:
            of_other[name[:90]] = of_other.get(name[:90], 0.0) + us
    return {
        "recomputed": sum(layer.recompute for layer in layers),
        "from_nf4": sum(any(j.kept is None for j in layer.joined) for layer in layers),
        "tokens": len(assembly.batches.step(next(steps))[0].input_ids),
        "eager_ms": median(eager[2:]),
        "ms": median(timed),
        "parts": {p: (n / PROFILED, us / 1e3 / PROFILED) for p, (n, us) in parts.items()},
        "other": sorted(of_other.items(), key=lambda item: -item[1])[:5],
        "said": said,
    }


def _matters(event: Any) -> bool:
    if event.kind == "choice":
        return event.key in ("kernels", "buckets", "copies", "keep_copy")
    return event.kind in ("fallback", "warning")


def _equal_steps(assembly: Any) -> Iterator[int]:
    """Numbers of steps whose batches fall into the bucket of the median batch, over and over."""

    def tokens(number: int) -> int:
        return len(assembly.batches.step(number)[0].input_ids)

    numbers = range(1, assembly.resolved.steps + 1)
    padded = {number: tokens(number) for number in numbers}
    middle = sorted(padded.values())[len(padded) // 2]
    fitting = [number for number in numbers if padded[number] == middle]
    while True:
        yield from fitting


def result_rows(variant: str, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    def row(case: str, metric: str, value: float, unit: str) -> dict[str, Any]:
        return {"case": case, "tool": "halfbyte", "metric": metric, "value": value, "unit": unit}

    yield row(variant, "tokens_padded", found["tokens"], "tokens")
    yield row(variant, "layers_recomputed", found["recomputed"], "layers")
    yield row(variant, "layers_from_nf4", found["from_nf4"], "layers")
    yield row(variant, "eager_ms_per_step", found["eager_ms"], "ms")
    yield row(variant, "ms_per_step", found["ms"], "ms")
    for part in ordered(found["parts"]):
        count, ms = found["parts"][part]
        yield row(f"{variant}: {part}", "kernels", count, "a step")
        yield row(f"{variant}: {part}", "kernel_ms", ms, "ms")


def ordered(parts: Iterable[str]) -> list[str]:
    """``parts`` as floors.py has them, what it does not know last."""
    return sorted(parts, key=lambda p: (*floors.PARTS, OTHER).index(p))


def print_variant(variant: str, found: dict[str, Any]) -> None:
    count = sum(n for n, _ in found["parts"].values())
    busy = sum(ms for _, ms in found["parts"].values())
    print(
        f"{variant}: {found['ms']:.2f} ms a step of {found['tokens']} tokens, eager "
        f"{found['eager_ms']:.1f} ms; profiled {busy:.2f} ms in {count:.0f} kernels; "
        f"{found['recomputed']} layers recomputed, {found['from_nf4']} out of NF4"
    )
    for part in ordered(found["parts"]):
        n, ms = found["parts"][part]
        print(f"  {part:32}{n:8.0f}{ms:9.3f} ms{ms / n * 1e3:9.2f} us each")
    for name, us in found["other"]:
        print(f"    {us / PROFILED / 1e3:.3f} ms  {name}")
    for text in found["said"]:
        print(f"  {text[:200]}")


if __name__ == "__main__":
    main()
