"""Compile the kernels of AdamW and of the cross-entropy for GPUs that are not here.

    python tests/compile_optim_loss.py

The launchers launch them with tensors on the CPU and are stopped before anything runs. Prints a
line of JSON for each kernel: its target, what it needs, some of its instructions. Triton's
interpreter has to be off.
"""

from __future__ import annotations

import json
import re

import torch

from halfbyte.kernels.adamw import adamw_8bit_, adamw_32bit_, adamw_scalars_
from halfbyte.kernels.cross_entropy import cross_entropy_rows_
from offline_compile import compile_for, compiled

BETAS_AND_EPS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


def launch_all(c: torch.dtype) -> None:
    yes, scalar, scalars = torch.tensor(True), torch.tensor(1.0), torch.zeros(4)
    count = torch.zeros((), dtype=torch.int64)
    adamw_scalars_(count, scalar, scalar, yes, scalars, beta1=0.9, beta2=0.999, weight_decay=0.01)
    flat = torch.zeros(1024)
    codes, scales, table = torch.zeros(1024, dtype=torch.uint8), torch.zeros(4), torch.zeros(2, 256)
    shadow = torch.zeros(1024, dtype=c)
    moments = (codes, scales, codes, scales)
    adamw_8bit_(flat, flat, *moments, scalars, yes, table, table, **BETAS_AND_EPS, shadow=shadow)
    adamw_32bit_(flat, flat, flat, flat, scalars, yes, **BETAS_AND_EPS)
    # Of the two vocabularies the second is long, and odd; the rows of its logits are not.
    loss, labels = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    cross_entropy_rows_(torch.zeros(4, 32000, dtype=c), labels, loss, scalar)
    logits = torch.zeros(4, 151680, dtype=c)[:, :151665]
    cross_entropy_rows_(logits, labels.int(), loss, scalar, softcap=30.0)
    cross_entropy_rows_(logits, labels, loss, scalar, need_grad=False)


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
                "conversions": kernel.asm["ttgir"].count("ttg.convert_layout"),
                "contracted": len(re.findall(r"\bfma\.rn\.f32", ptx)),
                "bytes": len(kernel.asm["cubin"]),
            }
            print(json.dumps(found))


if __name__ == "__main__":
    main()
