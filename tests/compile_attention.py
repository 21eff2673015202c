"""Compile the attention kernels, as their launchers launch them, for GPUs that are not here.

    python tests/compile_attention.py

Prints a line of JSON for each: the kernel, its case, its shared memory in bytes, and how many
matrix instructions and asynchronous copies it has. Triton's interpreter has to be off. Tensors lie
on the CPU: a launch is stopped before it runs.
"""

from __future__ import annotations

import json

import torch

from halfbyte.kernels import attention as file
from offline_compile import compile_for, compiled

T, HEADS, KV_HEADS = 768, 32, 4
CASES = (  # capability, head_dim, max_seqlen
    (80, 64, 512),
    (90, 64, 512),
    (90, 64, 2048),
    (86, 128, 2048),
    (90, 128, 2048),
)


def launch_all(head_dim: int, max_seqlen: int) -> None:
    def rows(width: int) -> torch.Tensor:
        return torch.empty(T, width + 64, dtype=torch.bfloat16)[:, :width]

    qkv = rows((HEADS + 2 * KV_HEADS) * head_dim)
    out = rows(HEADS * head_dim)
    lse = torch.empty(HEADS, T)
    cu_seqlens = torch.empty(5, dtype=torch.int32)
    shape = (max_seqlen, HEADS, KV_HEADS, head_dim, 0.125)
    file.attention(qkv, cu_seqlens, *shape, out, lse)
    file.attention_backward(out, qkv, out, lse, cu_seqlens, *shape, torch.empty_like(qkv), lse)


def main() -> None:
    for capability, head_dim, max_seqlen in CASES:
        compile_for(capability)
        file._roomy = lambda tensor, c=capability: divmod(c, 10) in file.ROOMY
        launch_all(head_dim, max_seqlen)
        for kernel in compiled():
            ptx = kernel.asm["ptx"]
            found = {
                "kernel": kernel.metadata.name,
                "case": [capability, head_dim, max_seqlen],
                "shared": kernel.metadata.shared,
                "products": ptx.count("wgmma.mma_async") + ptx.count("mma.sync"),
                "copies": ptx.count("cp.async.c"),
            }
            print(json.dumps(found))


if __name__ == "__main__":
    main()
