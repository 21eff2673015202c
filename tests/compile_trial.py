"""Compile the kernels of a T4 (sm_75) as a run of the TinyLlama recipe launches them, offline.

    python tests/compile_trial.py

Prints a line of JSON for each: its name and what it needs. Triton's interpreter has to be off.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

from halfbyte.kernels.trial.base import WrongResultError
from halfbyte.kernels.trial.cases import run_case
from halfbyte.kernels.trial.spec import BatchShape, GroupShape, trial_tasks
from kernel_trial_case import small_spec
from launched_kernels import no_comparisons, without_efficient_attention
from offline_compile import compile_for, compiled

TINYLLAMA = replace(
    small_spec("element-wise"),
    device="cpu",
    hidden=2048,
    intermediate=5632,
    vocabulary=32000,
    heads=32,
    kv_heads=4,
    head_dim=64,
    windows=(None,),
    groups=(
        GroupShape("qkv", 2048, 128, (2048, 256, 256), (0, 1, 2)),
        GroupShape("o", 2048, 128, (2048,), (0,)),
        GroupShape("gate_up", 2048, 128, (5632, 5632), (0, 1)),
        GroupShape("down", 5632, 128, (2048,), (0,)),
    ),
    rank=8,
    modules=154,
    block_size=64,
    batches=(BatchShape(64, 2, 64),),
    evaluated=(),
)


def main() -> None:
    compile_for(75)
    without_efficient_attention()
    no_comparisons()
    for task in trial_tasks(TINYLLAMA):
        with suppress(WrongResultError):
            run_case(TINYLLAMA, task)
    for kernel in compiled():
        assert kernel.asm["cubin"]
        print(json.dumps({"kernel": kernel.metadata.name, "shared": kernel.metadata.shared}))


if __name__ == "__main__":
    main()
