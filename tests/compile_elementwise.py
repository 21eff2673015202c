"""Compile the element-wise kernels, as their launchers launch them, for GPUs that are not here.

    python tests/compile_elementwise.py

Prints a line of JSON for each: the kernel, its target, what it needs, some of its instructions.
Triton's interpreter has to be off. Tensors lie on the CPU: a launch is stopped before it runs.
"""

from __future__ import annotations

import json
import re

import torch

from halfbyte.kernels.gated import gated, gated_backward
from halfbyte.kernels.nf4_dequantize import nf4_dequantize
from halfbyte.kernels.rms_norm import rms_norm, rms_norm_backward
from halfbyte.kernels.rope import rope_
from offline_compile import compile_for, compiled

TOKENS = 16


def launch_all(c: torch.dtype) -> None:
    """Each kernel in the shapes of a TinyLlama and with strides that are not multiples of 16."""

    def rows(width: int, extra: int = 0, dtype: torch.dtype = c) -> torch.Tensor:
        return torch.empty(TOKENS, width + extra, dtype=dtype)[:, :width]

    rstd = torch.empty(TOKENS)
    for width, stream_dtype in ((2048, torch.float32), (2048, c), (12288, torch.float32)):
        weight = torch.empty(width, dtype=c)
        stream = rows(width, dtype=stream_dtype)
        rms_norm(stream, rows(width), weight, 1e-5, stream, rows(width, 24), rstd)
        rms_norm(stream, None, weight, 1e-5, None, rows(width), rstd, unit_offset=True)
        rms_norm_backward(rows(width, 24), stream, rstd, weight, stream.clone(), rows(width, 8))
        rms_norm_backward(rows(width), stream, rstd, weight, stream.clone(), None, first=True)
    for head_dim, positions in ((64, torch.int32), (128, torch.int64), (80, torch.int64)):
        table = torch.empty(32, head_dim // 2)
        ids = torch.zeros(TOKENS, dtype=positions)
        rope_(rows(40 * head_dim), table, table, ids, 36, head_dim)
    for activation in ("silu", "gelu", "gelu_tanh"):
        gate_up = rows(2 * 5632)
        gated(gate_up, rows(5632, 24), activation)
        gated_backward(rows(5632), gate_up, gate_up, activation, rows(5632))
        gated_backward(rows(5632), gate_up, rows(2 * 5632, 24), activation)
    for block_size in (64, 34):
        shape = (256, 4096 if block_size != 34 else 68)
        codes = torch.empty(shape[0] * shape[1] // 2, dtype=torch.uint8)
        blocks = 2 * codes.numel() // block_size
        out = torch.empty(shape[0], shape[1] + 24, dtype=c)
        nf4_dequantize(codes, torch.empty(blocks), None, None, (0,), block_size, *shape, out)
        small, nested = torch.empty(blocks, dtype=torch.uint8), torch.empty(-(-blocks // 256))
        nf4_dequantize(codes, small, nested, torch.empty(1), (0,), block_size, *shape, out)


def main() -> None:
    for capability in (75, 80, 90):
        compile_for(capability)
        launch_all(torch.float16 if capability < 80 else torch.bfloat16)
        for kernel in compiled():
            ptx = kernel.asm["ptx"]
            found = {
                "kernel": kernel.metadata.name,
                "capability": capability,
                "shared": kernel.metadata.shared,
                "loads": sorted(set(re.findall(r"\bld\.global\S*", ptx))),
                "stores": sorted(set(re.findall(r"\bst\.global\S*", ptx))),
                "fused": len(re.findall(r"\bfma\.", ptx)),
                "bytes": len(kernel.asm["cubin"]),
            }
            print(json.dumps(found))


if __name__ == "__main__":
    main()
