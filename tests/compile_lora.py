"""Compile the adapters' kernels, as their launchers launch them, for GPUs that are not here.

    python tests/compile_lora.py

Prints a line of JSON for each: the kernel, its target, what it needs, how many matrix instructions
it has. Triton's interpreter has to be off. Tensors lie on the CPU: a launch is stopped before it
runs.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch

from halfbyte.kernels.dropout import apply_dropout, dropout_keys
from halfbyte.kernels.lora_group import (
    LoraGroup,
    LoraPart,
    fold_b,
    lora_down,
    lora_grad_input,
    lora_grads,
    make_fold,
    part_table,
)
from offline_compile import compile_for, compiled

COLUMNS, EXTRA = 2048, 128


def group_of(r: int, rows: tuple[int, ...], p: float, c: torch.dtype) -> LoraGroup:
    parts, at, row = [], 0, 0
    for module, count in enumerate(rows):
        parts.append(LoraPart(at, at + r * COLUMNS, row, count, module))
        at, row = at + r * (COLUMNS + count), row + count
    values = torch.empty(at)
    table = part_table(parts, torch.device("cpu"))
    return LoraGroup(tuple(parts), table, values, values.to(c), values, COLUMNS, EXTRA, r, 2.0, p)


def launch_products(c: torch.dtype) -> None:
    """In batches whose sums are split and in one whose are not."""
    keys = torch.empty(8, 2, dtype=torch.int32)
    for r, rows, tokens, p in (
        (16, (2048, 256, 256), 768, 0.05),
        (16, (2048,), 36000, 0.0),
        (64, (5632, 5632), 768, 0.05),
    ):
        group = group_of(r, rows, p, c)
        x = torch.empty(tokens, COLUMNS + EXTRA, dtype=c)
        d_y = torch.empty(tokens, sum(rows), dtype=c)
        lora_down(x, group, keys)
        lora_grads(x, x, d_y, group, keys)
        lora_grad_input(x, group, keys)


def launch_others(c: torch.dtype) -> None:
    group = group_of(16, (2048, 256, 256), 0.05, c)
    fold_b(make_fold([(group, torch.empty(2560, COLUMNS + EXTRA, dtype=c))]))
    keys = torch.empty(154, 2, dtype=torch.int32)
    dropout_keys(42, torch.zeros(2, dtype=torch.int64), keys)
    x = torch.empty(16, COLUMNS + EXTRA, dtype=c)
    for accumulate in (False, True):
        apply_dropout(x[:, :COLUMNS], keys[1], 0.05, x[:, :COLUMNS], accumulate=accumulate)


def main() -> None:
    for capability in (75, 80, 90):
        compile_for(capability)
        c = torch.float16 if capability < 80 else torch.bfloat16
        launch_others(c)
        if capability >= 80:
            launch_products(c)
        for kernel in compiled():
            found: dict[str, Any] = {
                "kernel": kernel.metadata.name,
                "capability": capability,
                "shared": kernel.metadata.shared,
                "products": len(re.findall(r"\bw?g?mma\.", kernel.asm["ptx"])),
                "bytes": len(kernel.asm["cubin"]),
            }
            print(json.dumps(found))


if __name__ == "__main__":
    main()
