"""A small trial of kernels, for more than one test file."""

from __future__ import annotations

import torch

from halfbyte.kernels.trial.spec import BatchShape, GroupShape, TrialSpec

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, RANK = 48, 96, 4, 2, 16, 4


def small_spec(
    kernels: str = "all", compute_dtype: str = "float16", stream_dtype: str = "float32"
) -> TrialSpec:
    """Of a model that has every odd thing: a group without adapters, one with some, a window."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    return TrialSpec(
        device="cuda:0" if torch.cuda.is_available() else "cpu",
        kernels=kernels,
        compute_dtype=compute_dtype,
        stream_dtype=stream_dtype,
        hidden=HIDDEN,
        intermediate=INTERMEDIATE,
        vocabulary=211,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        windows=(None, 16),
        activation="silu",
        softcap=None,
        groups=(
            GroupShape("qkv", HIDDEN, 16, (q, kv, kv), (0, 1, 2)),
            GroupShape("o", q, 8, (HIDDEN,), (0,)),
            GroupShape("gate_up", HIDDEN, 8, (INTERMEDIATE, INTERMEDIATE), (1,)),
            GroupShape("down", INTERMEDIATE, 0, (HIDDEN,), ()),
        ),
        rank=RANK,
        scale=2.0,
        dropout=0.1,
        modules=5,
        block_size=16,
        double_quantization=True,
        moments_8bit=True,
        parameters_32bit=300,
        betas=(0.9, 0.999),
        epsilon=1e-8,
        weight_decay=0.01,
        batches=(BatchShape(64, 3, 32), BatchShape(130, 4, 64)),
        evaluated=(BatchShape(41, 3, 30),),
    )
