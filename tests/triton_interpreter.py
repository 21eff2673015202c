"""Triton's interpreter for machines without a GPU; import this before any kernel
(``# isort: split`` after it). Skips the module that imports it where there is no Triton.

``DEVICE`` is where kernels can be tested. The interpreter gets two repairs, which change nothing
where it needs none.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

_patch_lang_tensor = interpreter._patch_lang_tensor
_create_dot = interpreter.InterpreterBuilder.create_dot


def _patch(tensor: Any, scope: Any) -> None:
    """Let a scalar be a loop's bound: it is an array of one element, and NumPy 2.4 makes no integer
    of an array that has a dimension."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """bf16 is kept as its bits, which products have to take as numbers."""
    return _create_dot(self, _as_number(a), _as_number(b), *rest)


def _as_number(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16 or operand.data.dtype != np.uint16:
        return operand
    bits = operand.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


interpreter._patch_lang_tensor = _patch
interpreter.InterpreterBuilder.create_dot = _dot
