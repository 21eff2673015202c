"""Seconds of a training step, roughly: to tell apart ways of doing it, and hours from days.

A forward pass multiplies every weight with every token, 2 operations each; the backward pass needs
the gradient of the input alone (weights are frozen), 2 more; a recomputed forward pass 2 more. The
adapter's own products are counted with both its gradients, attention with the half of the scores
that causality leaves, the head with the labelled tokens. A weight of which no copy is kept is
dequantized once for each of those passes. What a device reaches grows with the tokens of a pass
and flattens: T / (T + t), with t the tokens at which half the peak is reached.
"""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.plan.device import Device
from halfbyte.plan.memory import Setup
from halfbyte.plan.parameters import ModelShape


@dataclass(frozen=True)
class Speed:
    """``flops`` operations/s of large products; ``half`` tokens at which half of it is reached;
    ``dequantized`` weights/s; ``launch`` seconds for each operation of a layer."""

    flops: float
    half: float
    dequantized: float
    launch: float


# 16-bit products of GPUs by compute capability: what their dense products reach in practice, about
# 0.7 of the peak that their makers state, and weights dequantized at their memory's rate.
_GPUS: dict[tuple[int, int], Speed] = {
    (7, 0): Speed(7e13, 512, 2e11, 11e-6),
    (7, 5): Speed(3e13, 512, 8e10, 11e-6),
    (8, 0): Speed(2.2e14, 1024, 4e11, 11e-6),
    (8, 6): Speed(6e13, 512, 2e11, 11e-6),
    (8, 9): Speed(1.1e14, 768, 2e11, 11e-6),
    (9, 0): Speed(7.5e14, 2300, 8e11, 11e-6),
    (10, 0): Speed(1.5e15, 4096, 1.6e12, 11e-6),
}
_OPERATIONS = 60  # launched for one layer, forward and backward
_CPU_THREAD_FLOPS = 7e10  # fp32 on an AVX2 core: 140 GFLOP/s were measured on two
_CPU_THREAD_DEQUANTIZED = 5e7


def device_speed(device: Device, precision: str) -> Speed:
    """What ``device`` does in ``precision``: from a table for GPUs, by its threads for a CPU."""
    if device.capability is None:
        slow = 1.0
        if precision != "fp32":
            slow = 2.0 if device.bf16_native and precision == "bf16" else 1 / 50
        flops = _CPU_THREAD_FLOPS * device.threads * slow
        return Speed(flops, 64, _CPU_THREAD_DEQUANTIZED * device.threads, 20e-6)
    at = max((c for c in _GPUS if c <= device.capability), default=min(_GPUS))
    speed = _GPUS[at]
    emulated = precision == "bf16" and not device.bf16_native
    if precision == "fp32" or emulated:
        return Speed(speed.flops / 8, speed.half, speed.dequantized, speed.launch)
    return speed


def step_seconds(
    shape: ModelShape,
    setup: Setup,
    speed: Speed,
    *,
    tokens: int,
    row_tokens: int,
    passes: int,
    checkpointing: bool,
    keep_copy: bool,
) -> float:
    """Seconds of an optimizer step of ``passes`` forward passes of ``tokens`` tokens each.

    ``row_tokens`` are the tokens of one row, within which attention looks back.
    """
    rounds = 3 if checkpointing else 2  # forward, (forward again,) backward
    adapter = shape.trainable(setup.r, setup.target_modules)
    products = 2 * rounds * shape.linear + (2 * rounds + 2) * adapter + 4 * shape.head
    attention = (2 * rounds + 1) * shape.layers * shape.heads * shape.head_dim * row_tokens
    reached = speed.flops * tokens / (tokens + speed.half)
    seconds = tokens * (products + attention) / reached
    if not keep_copy:
        seconds += rounds * shape.linear / speed.dequantized
    seconds += rounds / 2 * _OPERATIONS * shape.layers * speed.launch
    return passes * seconds
