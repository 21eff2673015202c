"""Seconds of a training step, roughly: to tell apart ways of doing it, and hours from days.

A forward pass multiplies every weight with every token, 2 operations each; the backward pass needs
the gradient of the input alone (weights are frozen), 2 more; a recomputed forward pass 2 more. The
adapter's own products are counted with both its gradients, attention with the half of the scores
that causality leaves, the head with the labelled tokens. A weight of which no copy is kept is
dequantized once for each of those passes. What a device reaches grows with the tokens of a pass
and flattens: T / (T + t), with t the tokens at which half the peak is reached.

Fused layers are launched in a graph, and dequantize in the forward and in the backward pass: to
recompute a layer, its weights are there. On an H100 the recipe for TinyLlama (742 tokens a step,
22 layers) took 8.4 ms with all copies kept and nothing recomputed, and 13.4 ms the other way
round: 1.8 ms of it for dequantizing, the rest for recomputing. What is below gives 8.4 and 14.1.
"""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.plan.device import Device
from halfbyte.plan.memory import Setup
from halfbyte.plan.parameters import ModelShape


@dataclass(frozen=True)
class Speed:
    """``flops`` operations/s of large products; ``half`` tokens at which half of it is reached;
    ``dequantized`` weights/s; ``launch`` seconds for each operation of a layer, from Python."""

    flops: float
    half: float
    dequantized: float
    launch: float


# 16-bit products of GPUs by compute capability: what a step's dense products reach in practice,
# about 0.65 of the peak that their makers state, and weights dequantized at their memory's rate
# (2.5 bytes each). Measured is 9.0; the others follow from it by their makers' figures.
_GPUS: dict[tuple[int, int], Speed] = {
    (7, 0): Speed(7e13, 200, 3e11, 11e-6),
    (7, 5): Speed(3e13, 200, 1.1e11, 11e-6),
    (8, 0): Speed(2e14, 300, 5.5e11, 11e-6),
    (8, 6): Speed(6e13, 200, 2.5e11, 11e-6),
    (8, 9): Speed(1.1e14, 250, 3e11, 11e-6),
    (9, 0): Speed(6.5e14, 480, 1.08e12, 11e-6),
    (10, 0): Speed(1.3e15, 900, 2.2e12, 11e-6),
}
_OPERATIONS = 60  # launched for one layer, forward and backward
# The same for a fused layer, and what the launch of one costs inside a graph.
_FUSED_OPERATIONS, _GRAPH_LAUNCH = 32, 0.7e-6
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
    recomputed: int,
    copied: int,
    adapter: int | None = None,
) -> float:
    """Seconds of an optimizer step of ``passes`` forward passes of ``tokens`` tokens each.

    ``row_tokens`` are the tokens of one row, within which attention looks back. ``recomputed``
    layers are recomputed, of ``copied`` layers a copy is kept. ``adapter`` is the number of trained
    parameters, if it has been counted.
    """
    rounds = 2 + recomputed / shape.layers  # forward, (forward again,) backward
    if adapter is None:
        adapter = sum(setup.trained(shape))
    # Of its experts a token meets those that are chosen for it; all are dequantized.
    met = sum(layer.chosen * sum(layer.matrices) for layer in shape.experts)
    products = 2 * rounds * (shape.linear + met) + (2 * rounds + 2) * adapter + 4 * shape.head
    attention = (2 * rounds + 1) * shape.layers * shape.heads * shape.head_dim * row_tokens
    reached = speed.flops * tokens / (tokens + speed.half)
    seconds = tokens * (products + attention) / reached
    dequantized = (2 if setup.fused else rounds) * (1 - copied / shape.layers)
    seconds += dequantized * shape.linear / speed.dequantized
    seconds += rounds * shape.in_experts / speed.dequantized
    operations, launch = _OPERATIONS, speed.launch
    if setup.fused:
        operations, launch = _FUSED_OPERATIONS, _GRAPH_LAUNCH
    seconds += rounds / 2 * operations * shape.layers * launch
    return passes * seconds
