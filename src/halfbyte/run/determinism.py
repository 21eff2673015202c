"""The same seed gives the same bits: PyTorch's switches for it, for as long as a run lasts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
# What cuBLAS promises the same bits with; the first is what PyTorch gives it on an H100 anyway.
CUBLAS_SAME_BITS = (":4096:8", ":16:8")


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """With ``on`` no kernel of PyTorch's is used on a GPU whose results differ from run to run.

    halfbyte's own give the same bits always. What is left to PyTorch is told to, strictly: asked
    only to warn, it would keep the backward passes of flash and memory-efficient attention that
    add in any order. It takes the ordered ones of those, leaves cuDNN's attention out, sorts what
    is put at indices, and raises where it has nothing of the kind, which no part of a training step
    needs (a cumulative sum of numbers with a fraction is the one to keep out).

    Must be entered before the process has multiplied on a GPU, since cuBLAS reads its environment
    variable then and PyTorch with it. All that is changed is put back at the end. Without ``on``
    everything stays as the process has it.
    """
    if not on:
        yield
        return
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    mode, workspace = torch.get_deterministic_debug_mode(), os.environ.get(CUBLAS)
    if workspace not in CUBLAS_SAME_BITS:
        os.environ[CUBLAS] = CUBLAS_SAME_BITS[0]
    try:
        # The switch of torch.use_deterministic_algorithms, which would import Inductor as well.
        torch.set_deterministic_debug_mode("error")
        # Else a pass over every tensor that is made, so that what is read unwritten is the same.
        memory.fill_uninitialized_memory = False
        yield
    finally:
        memory.fill_uninitialized_memory = filled
        torch.set_deterministic_debug_mode(mode)
        if workspace is None:
            os.environ.pop(CUBLAS, None)
        else:
            os.environ[CUBLAS] = workspace
