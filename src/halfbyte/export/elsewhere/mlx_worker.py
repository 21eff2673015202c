"""What mlx-lm is asked, in a process of its own, by a Python that has it and perhaps no halfbyte.

Run by worker_frame.py.
"""

from __future__ import annotations

import os
from typing import Any

PACKAGE = "mlx-lm"


def write(job: dict[str, Any]) -> None:
    """The model in the folder ``model`` in MLX's format, written as ``out``, an empty folder."""
    from mlx_lm import convert

    os.rmdir(job["out"])  # mlx-lm wants to make it
    convert(
        job["model"],
        job["out"],
        quantize=job["bits"] is not None,
        q_bits=job["bits"],
        q_group_size=job["group"],
        dtype=job["dtype"],
        trust_remote_code=False,
    )


def ask(job: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What mlx-lm loads of the folder ``model``: tokens of ``texts``, logits of ``rows`` of ids,
    into the file ``logits`` (npz), template, ends of an answer, and which matrices have groups."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm import load
    from mlx_lm.utils import dequantize_model

    model, tokenizer = load(
        job["model"],
        tokenizer_config={"trust_remote_code": False},
        trust_remote_code=False,
    )
    layers = [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "weight")]
    matrices = {name: hasattr(layer, "bits") for name, layer in layers if layer.weight.ndim > 1}
    if any(matrices.values()) and mx.default_device() == mx.cpu:
        # Without a GPU its products with groups take minutes where those with the same numbers in
        # 16 bits take seconds.
        model = dequantize_model(model)
    logits: dict[str, Any] = {}
    for number, row in enumerate(job["rows"]):
        found = model(mx.array(row)[None])[0].astype(mx.float32)
        logits[str(number)] = np.array(found)
    np.savez(job["logits"], **logits)
    return tokenizer, {
        "template": tokenizer.chat_template,
        "ends": sorted(tokenizer.eos_token_ids),
        "quantized": sum(matrices.values()),
        "kept": [name for name, quantized in matrices.items() if not quantized],
    }
