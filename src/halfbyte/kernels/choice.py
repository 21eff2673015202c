"""Which implementation of each kernel a run uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from halfbyte.kernels import (
    attention,
    attention_efficient,
    cross_entropy,
    dropout,
    gated,
    lora_group,
    lora_group_plain,
    nf4_dequantize,
    rms_norm,
    rope,
    triton_shim,
)

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Kernels:
    """The functions that a fused layer is made of; each name's module says what it does."""

    rms_norm: Kernel
    rms_norm_backward: Kernel
    rope: Kernel
    gated: Kernel
    gated_backward: Kernel
    attention: Kernel
    attention_backward: Kernel
    attention_lse_shape: Callable[[int, int, int, int], tuple[int, ...]]
    lora_down: Kernel
    lora_grad_input: Kernel
    lora_grads: Kernel
    fold_b: Kernel
    dequantize: Kernel
    dropout_keys: Kernel
    apply_dropout: Kernel | None  # None: masks are made, and multiplied with
    head_loss: Kernel
    adamw: bool  # whether the optimizer uses its kernels, halfbyte.kernels.adamw


PLAIN = Kernels(
    rms_norm=rms_norm.rms_norm_reference,
    rms_norm_backward=rms_norm.rms_norm_backward_reference,
    rope=rope.rope_reference_,
    gated=gated.gated_reference,
    gated_backward=gated.gated_backward_reference,
    attention=attention.attention_reference,
    attention_backward=attention.attention_backward_reference,
    attention_lse_shape=attention.lse_shape,
    lora_down=lora_group_plain.lora_down,
    lora_grad_input=lora_group_plain.lora_grad_input,
    lora_grads=lora_group_plain.lora_grads,
    fold_b=lora_group_plain.fold_b,
    dequantize=nf4_dequantize.nf4_dequantize_reference,
    dropout_keys=dropout.dropout_keys_reference,
    apply_dropout=None,
    head_loss=cross_entropy.head_loss_reference,
    adamw=False,
)

# What needs no matrix instructions, and so runs wherever Triton does.
ELEMENTWISE = replace(
    PLAIN,
    rms_norm=rms_norm.rms_norm,
    rms_norm_backward=rms_norm.rms_norm_backward,
    rope=rope.rope_,
    gated=gated.gated,
    gated_backward=gated.gated_backward,
    attention=attention_efficient.attention,
    attention_backward=attention_efficient.attention_backward,
    attention_lse_shape=attention_efficient.lse_shape,
    lora_down=partial(lora_group_plain.lora_down, apply=dropout.apply_dropout),
    lora_grad_input=partial(lora_group_plain.lora_grad_input, apply=dropout.apply_dropout),
    lora_grads=partial(lora_group_plain.lora_grads, apply=dropout.apply_dropout),
    fold_b=lora_group.fold_b,
    dequantize=nf4_dequantize.nf4_dequantize,
    dropout_keys=dropout.dropout_keys,
    apply_dropout=dropout.apply_dropout,
    head_loss=cross_entropy.head_loss,
    adamw=True,
)

ALL = replace(
    ELEMENTWISE,
    attention=attention.attention,
    attention_backward=attention.attention_backward,
    attention_lse_shape=attention.lse_shape,
    lora_down=lora_group.lora_down,
    lora_grad_input=lora_group.lora_grad_input,
    lora_grads=lora_group.lora_grads,
)


def choose_kernels(capability: tuple[int, int] | None) -> tuple[Kernels, str]:
    """The kernels for a GPU of this compute capability (None: a CPU), and what they are in words.

    Triton's matrix products need Ampere (8.0); what is element-wise runs from Turing (7.5) on.
    """
    if capability is None:
        return PLAIN, "PyTorch's own operations"
    if not triton_shim.INSTALLED:
        return PLAIN, "PyTorch's own operations: Triton is not installed"
    if capability >= (8, 0):
        return ALL, "Triton kernels"
    if capability >= (7, 5):
        return ELEMENTWISE, "element-wise Triton kernels, all products by cuBLAS"
    return PLAIN, f"PyTorch's own operations: Triton needs compute capability 7.5, not {capability}"
