"""Bytes of a training step of fused layers (:mod:`halfbyte.model.fused_layer`).

The letters are those of :mod:`halfbyte.plan.memory`. A joined weight has x further columns for its
adapters (:func:`~halfbyte.quant.joined.extra_columns`), and so has its input.

*Kept for the backward pass*, per token: by a layer that is recomputed its input, e·H; by another

    2·e·H + 2·4 + c·(Q + 2K) + 4·heads + c·(Q + x_o) + c·2I

(both sums of the stream, 1 / rms of both norms, q, k and v, attention's log-sums and output, gate
and up), and the input of q, k and v or of gate and up, c·(H + x), if one of these has an adapter.
The first layers are recomputed: when the backward pass reaches them, the others have given back
what they kept.

*Copies* take c·rows·(columns + x) of each joined weight; where a layer has none, all four joined
weights of one layer have scratch memory. The adapter has values and gradients in fp32, and its
values in c once more.

*What comes and goes.* A step has five moments at which memory may be at its peak: the forward and
the backward pass of the last layer and of the last layer that is recomputed, and the loss, with one
chunk of logits in c. To their largest come cuBLAS's work space and a share for PyTorch's allocator,
which cuts memory into blocks of whole 512 bytes and leaves up to 1 MiB of a large one unused: the
recipe for TinyLlama took 1 to 2 % more than the tensors in it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from halfbyte.model.fused import FEW_LOGIT_BYTES, LOGIT_BYTES
from halfbyte.plan.memory import (
    Setup,
    StepMemory,
    head_copy,
    optimizer_bytes,
    padded_attention,
    weight_bytes,
)
from halfbyte.plan.memory_attention import Room
from halfbyte.plan.parameters import ModelShape
from halfbyte.quant.joined import extra_columns

# Layers that are one product, by the last part of their names.
_JOINED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv"),
    "o_proj": "o",
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up"),
    "down_proj": "down",
}
# cuBLAS's default is 32 MiB on Hopper and less before it; the measured runs took twice that.
WORKSPACE_BYTES = 2 * 32 * 1024**2
ALLOCATOR_SHARE = 1 / 32


@dataclass(frozen=True)
class FusedBytes:
    """What one fused layer takes."""

    recomputed: int  # kept of a token if the layer is recomputed
    whole: int  # kept of a token if not
    forward: int  # of a token, beside what is kept, until the layer has been computed
    backward: int  # of a token, beside what is kept, until its gradient has been
    attention: int  # the same at the moment of attention's, which may take less than was kept
    copy: int  # of its weights dequantized


class FusedMemory:
    """The memory of steps of one model, whatever is recomputed and copied."""

    def __init__(self, shape: ModelShape, setup: Setup) -> None:
        self.shape, self.setup = shape, setup
        self.layers = fused_layers(shape, setup)
        c = setup.compute
        self.weights = weight_bytes(shape, setup) + head_copy(shape, setup)
        self.adapter = (8 + c) * sum(setup.trained(shape))
        self.optimizer = optimizer_bytes(shape, setup)
        # What stands between layers and the loss, of a token: the stream before the last norm and
        # the hidden states after it; in a layer the stream or its gradient, in both types.
        self._ends = (setup.rest + c) * shape.hidden
        # Of the first n layers, for each n.
        self._recomputed = _sums(layer.recomputed for layer in self.layers)
        self._whole = _sums(layer.whole for layer in self.layers)
        self._copies = _sums(layer.copy for layer in self.layers)

    def kept_per_token(self, recomputed: int, count: int | None = None) -> int:
        """What the first ``count`` layers (all by default) keep of a token."""
        count = len(self.layers) if count is None else count
        first = min(recomputed, count)
        return self._recomputed[first] + self._whole[count] - self._whole[first]

    def step(
        self,
        tokens: int,
        labels: int,
        *,
        recomputed: int,
        copied: int,
        room: Room | None = None,
    ) -> StepMemory:
        """A pass over ``tokens`` positions, of which ``labels`` are learned.

        The first ``recomputed`` layers are recomputed, of the first ``copied`` a copy is kept.
        ``room`` is that of the pass: by default one row of all tokens.
        """
        activations = self.kept(tokens, recomputed, room) + tokens * self._ends
        loss = self._loss(tokens, labels, recomputed)
        peak = self.peak(tokens, labels, recomputed, room)
        scratch = 0 if copied == len(self.layers) else max(layer.copy for layer in self.layers)
        lasting = self.weights + self._copies[copied] + self.adapter + self.optimizer + scratch
        allocator = int((lasting + peak) * ALLOCATOR_SHARE)
        return StepMemory(
            weights=self.weights,
            copy=self._copies[copied],
            adapter=self.adapter,
            optimizer=self.optimizer,
            activations=activations,
            loss=loss,
            working=scratch + peak - activations - loss + WORKSPACE_BYTES + allocator,
        )

    def peak(self, tokens: int, labels: int, recomputed: int, room: Room | None = None) -> int:
        """The most that a step's own tensors take, at whichever moment it is."""
        found = self.kept(tokens, recomputed, room) + tokens * self._ends
        found += self._loss(tokens, labels, recomputed)
        sums, summed = padded_attention(self.shape, self.setup, tokens, room)
        for number in {len(self.layers), recomputed} - {0}:
            layer = self.layers[number - 1]
            kept = self.kept(tokens, recomputed, room, number - 1) + sums
            kept += tokens * (layer.whole + self._ends)
            passing = tokens * max(layer.forward, layer.backward)
            found = max(found, kept + max(passing, tokens * layer.attention + summed))
        return found

    def most_copies(
        self, tokens: int, labels: int, recomputed: int, limit: int, room: Room | None = None
    ) -> int:
        """Of how many layers a copy can be kept within ``limit`` bytes; 0 where nothing fits."""

        def total(copied: int) -> int:
            step = self.step(tokens, labels, recomputed=recomputed, copied=copied, room=room)
            return step.total

        layers = len(self.layers)
        if total(layers) <= limit:  # which needs no scratch memory
            return layers
        return max(0, bisect_right(range(layers), limit, key=total) - 1)

    def kept(
        self, tokens: int, recomputed: int, room: Room | None, count: int | None = None
    ) -> int:
        """What the first ``count`` layers (all by default) keep of a pass."""
        count = len(self.layers) if count is None else count
        sums, _ = padded_attention(self.shape, self.setup, tokens, room)
        return tokens * self.kept_per_token(recomputed, count) + max(0, count - recomputed) * sums

    def _loss(self, tokens: int, labels: int, recomputed: int) -> int:
        c, shape = self.setup.compute, self.shape
        hidden = c * shape.hidden * labels * (1 if labels >= tokens else 2)
        if not self.setup.triton:
            # Hidden states, head and six forms of all logits in fp32.
            return hidden + 4 * (2 * labels * shape.hidden + shape.head + 6 * labels * shape.vocab)
        at_once = FEW_LOGIT_BYTES if recomputed == len(self.layers) else LOGIT_BYTES
        return hidden + min(at_once, c * (shape.vocab + 16) * labels) + 8 * labels


def fused_layers(shape: ModelShape, setup: Setup) -> list[FusedBytes]:
    """Each layer's bytes, in order; layers differ where a recipe adapts some of them alone."""
    adapted = set(setup.adapters(shape))
    layers: dict[str, dict[str, list[tuple[int, int, bool]]]] = {}
    for name, (rows, columns) in shape.linears.items():
        layer, _, leaf = name.rsplit(".", 2)
        joined = layers.setdefault(layer, {}).setdefault(_JOINED[leaf], [])
        joined.append((rows, columns, name in adapted))
    return [_fused_layer(shape, setup, parts) for parts in layers.values()]


def _fused_layer(
    shape: ModelShape, setup: Setup, parts: dict[str, list[tuple[int, int, bool]]]
) -> FusedBytes:
    c, stream = setup.compute, setup.rest * shape.hidden
    count = {name: sum(has for *_, has in part) for name, part in parts.items()}
    rows = {name: sum(rows for rows, *_ in part) for name, part in parts.items()}
    width = {
        name: part[0][1] + extra_columns(part[0][1], count[name], setup.r)
        for name, part in parts.items()
    }
    whole = 2 * (stream + 4) + 4 * shape.heads + c * (rows["qkv"] + width["o"] + rows["gate_up"])
    whole += sum(c * width[name] for name in ("qkv", "gate_up") if count[name])
    # The widest input and output between them, and the gradients of attention by the kernels that
    # take most: six times as wide as all query heads.
    inner = c * width["down"]
    attention = c * (width["o"] + rows["qkv"] + 6 * shape.heads * shape.head_dim)
    return FusedBytes(
        recomputed=stream,
        whole=whole,
        forward=max(inner, c * width["gate_up"]) + c * shape.hidden,
        backward=inner * (2 if count["down"] else 1),
        attention=attention - c * rows["gate_up"],
        copy=c * sum(rows[name] * width[name] for name in parts),
    )


def _sums(values: Iterable[int]) -> list[int]:
    """The sum of the first n, for each n from 0."""
    return [0, *accumulate(values)]
