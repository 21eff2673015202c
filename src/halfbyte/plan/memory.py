"""Bytes of a training step as functions of the recipe and the model's shape.

The derivation, for a decoder of L layers with a gated MLP. H is the width of the residual stream,
Q and K the widths of all query and all key heads, I that of the MLP, r the rank, T the tokens of a
forward pass; c bytes are an element of the products' type, e one of the type that embeddings and
norms are kept in, which is also the residual stream's.

*Weights.* A quantized weight of n elements takes n/2 bytes of codes and 4·⌈n/64⌉ of scales; with
double quantization ⌈n/64⌉ + 4·⌈⌈n/64⌉/256⌉ + 4. The rest takes e bytes each, but c each of
embedding and head where they are stored in the products' type. A copy kept for speed takes c·n;
without one, the largest layer is dequantized in each pass and dropped.

*Kept for the backward pass*, per token and layer, in an engine that keeps nothing it can make
again:

- each norm keeps its input in fp32 (4 times its width; the residual itself where e is 4);
- attention keeps q, k, v and its output, c·(2Q + 2K), and 4 bytes a head of log-sums;
- the MLP keeps what goes into the activation, what comes out, and the other factor: 3·c·I;
- an adapted layer keeps its input, which layers that share it keep once (q, k and v; gate and up):
  the norm's output, e·H, for those, the attention's output c·Q, the MLP's product c·I; and the
  adapter's inner product, c·r; with DoRA also its output before the magnitudes. A layer without
  an adapter keeps nothing.

- experts keep 3·c·I of the tokens that are sent to each, filled up to whole products, and e·H of
  what each choice gives.

With checkpointing each layer keeps its input, e·H a token, and one layer at a time all of it.

*The loss* keeps its gradient in the last hidden states, 2·c·H for each labelled token, and works
on one chunk of logits: three tensors of at most 128 MB in fp32.

That is a step by autograd; :mod:`halfbyte.plan.memory_fused` has the one of fused layers, and
:mod:`halfbyte.plan.memory_attention` what attention takes where its kernels pad rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from halfbyte.kernels.loss import CHUNK_BYTES
from halfbyte.kernels.nf4 import SCALES_PER_BLOCK
from halfbyte.model.experts import TILE
from halfbyte.model.lora_targets import Targets
from halfbyte.plan.memory_attention import Room, backward_bytes, log_sums
from halfbyte.plan.parameters import ExpertShape, ModelShape, TrainedEnd

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}

# Layers that share their input, by the last part of the name: it is kept once.
_SHARED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), "attention"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), "mlp"),
}
# bitsandbytes' 8-bit AdamW keeps fp32 state for smaller tensors, one scale for so many elements.
_MIN_8BIT, _STATE_BLOCK = 4096, 256


@dataclass(frozen=True)
class Setup:
    """What of a recipe decides the memory of a step."""

    precision: str  # "bf16", "fp16" or "fp32"
    upcast_rest: bool
    block_size: int
    double_quant: bool
    r: int
    target_modules: Targets
    optimizer: str
    fused: bool = False  # the layers are fused ones
    triton: bool = True  # fused layers are made of Triton kernels
    pads_rows: bool = False  # attention counts each row as long as the longest
    exclude_modules: Targets = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    use_dora: bool = False
    trained_rows: tuple[TrainedEnd, ...] = ()  # of embedding and head

    @property
    def compute(self) -> int:
        """Bytes of an element of the products' type."""
        return ITEMSIZE[self.precision]

    @property
    def rest(self) -> int:
        """Bytes of an element of embeddings, norms and residual stream."""
        return 4 if self.upcast_rest else self.compute

    def adapters(self, shape: ModelShape) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
        """Shapes of A [r, in] and B [out, r] of each adapted layer of ``shape``."""
        return shape.adapter_shapes(
            self.r, self.target_modules, self.exclude_modules, self.rank_pattern
        )

    def trained(self, shape: ModelShape) -> list[int]:
        """Elements of each trained tensor."""
        adapters = self.adapters(shape)
        found = [rows * columns for pair in adapters.values() for rows, columns in pair]
        if self.use_dora:
            found += [rows for _, (rows, _) in adapters.values()]
        return found + [end.elements for end in self.trained_rows]


@dataclass(frozen=True)
class StepMemory:
    """Bytes of the parts of a step; an upper estimate of the peak is their sum."""

    weights: int  # NF4 and the rest
    copy: int  # dequantized weights that are kept
    adapter: int  # with its gradients
    optimizer: int
    activations: int
    loss: int
    working: int  # what comes and goes: a dequantized layer, the gradients of activations

    @property
    def total(self) -> int:
        return (
            self.weights
            + self.copy
            + self.adapter
            + self.optimizer
            + self.activations
            + self.loss
            + self.working
        )


def step_memory(
    shape: ModelShape,
    setup: Setup,
    *,
    tokens: int,
    checkpointing: bool,
    keep_copy: bool,
    room: Room | None = None,
) -> StepMemory:
    """One forward and backward pass by autograd over ``tokens`` tokens, all of them labelled.

    ``room`` is that of the pass: by default one row of all tokens.
    """
    sums, summed = padded_attention(shape, setup, tokens, room)
    copy = setup.compute * shape.linear if keep_copy else 0
    widest = max(shape.intermediate, shape.hidden, shape.heads * shape.head_dim)
    dequantized = 0 if keep_copy else (setup.compute + 8) * shape.largest_linear
    # A token's copies for its experts, what they give, and the gradients of one of the two.
    sent = max((layer.chosen * layer.hidden for layer in shape.experts), default=0) * tokens
    return StepMemory(
        weights=weight_bytes(shape, setup),
        copy=copy,
        adapter=8 * sum(setup.trained(shape)),
        optimizer=optimizer_bytes(shape, setup),
        activations=activation_bytes(shape, setup, tokens=tokens, checkpointing=checkpointing)
        + sums * (1 if checkpointing else shape.layers),
        loss=loss_bytes(shape, setup, labels=tokens),
        working=head_copy(shape, setup)
        + dequantized
        + 4 * setup.compute * widest * tokens
        + 3 * setup.rest * sent
        + summed
        # A gradient of the rows, before it is added to what other passes gave.
        + 4 * max((end.elements for end in setup.trained_rows), default=0),
    )


def padded_attention(
    shape: ModelShape, setup: Setup, tokens: int, room: Room | None = None
) -> tuple[int, int]:
    """What a layer keeps of attention's log-sums beyond 4 bytes a head and token, and what comes
    and goes in its backward pass; nothing where its kernels do not pad rows."""
    if not setup.pads_rows:
        return 0, 0
    room = room or Room(1, tokens)
    sums = log_sums(shape.heads, room) - 4 * shape.heads * tokens
    return sums, backward_bytes(shape.heads, shape.head_dim, setup.compute, room)


def nf4_bytes(elements: int, block_size: int, double_quant: bool) -> int:
    """Codes and scales of a weight, as ``quant.nf4.NF4Weight`` stores them."""
    blocks = -(-elements // block_size)
    codes = (elements + 1) // 2
    if double_quant:
        return codes + blocks + 4 * -(-blocks // SCALES_PER_BLOCK) + 4
    return codes + 4 * blocks


def weight_bytes(shape: ModelShape, setup: Setup) -> int:
    """All frozen weights as they are stored."""
    linears = sum(
        setup.compute * rows * columns
        if name in shape.left_out
        else nf4_bytes(rows * columns, setup.block_size, setup.double_quant)
        for name, (rows, columns) in shape.linears.items()
    )
    narrow = shape.ends if has_narrow_ends(shape, setup) else 0
    return (
        linears
        + _expert_bytes(shape, setup)
        + setup.rest * (shape.rest - narrow)
        + setup.compute * narrow
    )


def _expert_bytes(shape: ModelShape, setup: Setup) -> int:
    if shape.experts_left_out:
        return setup.compute * shape.in_experts
    return sum(
        layer.count * nf4_bytes(elements, setup.block_size, setup.double_quant)
        for layer in shape.experts
        for elements in layer.matrices
    )


def has_narrow_ends(shape: ModelShape, setup: Setup) -> bool:
    """Whether embedding and head stay in the products' type, in which they are stored."""
    return setup.compute < setup.rest and shape.stored == setup.precision


def head_copy(shape: ModelShape, setup: Setup) -> int:
    """The head in the products' type, where it is kept in another."""
    if setup.rest == setup.compute or (shape.ends and has_narrow_ends(shape, setup)):
        return 0
    return setup.compute * shape.head


def optimizer_bytes(shape: ModelShape, setup: Setup) -> int:
    """Two moments for each trained element: 8 bytes in fp32, 2 and their scales in 8 bits."""
    total = 0
    in_fp32 = sum(end.elements for end in setup.trained_rows if end.full_state)
    for n in setup.trained(shape):
        if setup.optimizer == "adamw" or n < _MIN_8BIT:
            total += 8 * n
        else:
            total += 2 * n + 8 * -(-n // _STATE_BLOCK)
    if setup.optimizer != "adamw":
        total += 6 * in_fp32
    return total


def kept_per_token(shape: ModelShape, setup: Setup) -> int:
    """Bytes that all layers together keep for one token, without checkpointing."""
    c = setup.compute
    q, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = c * (2 * q + 2 * k) + 4 * shape.heads
    mlps = 3 * c * shape.mlp_width
    norms = 4 * shape.norm_width
    return norms + shape.layers * attention + mlps + _adapted_inputs(shape, setup)


def kept_bytes(shape: ModelShape, setup: Setup, *, tokens: int, checkpointing: bool) -> int:
    """What a forward pass over ``tokens`` tokens keeps for its backward pass, the loss apart."""
    stream = setup.rest * shape.hidden
    if checkpointing:
        return tokens * (shape.layers + 1) * stream  # and the last hidden states
    experts = sum(_kept_by_experts(layer, setup, tokens) for layer in shape.experts)
    return tokens * (kept_per_token(shape, setup) + stream) + experts


def _kept_by_experts(layer: ExpertShape, setup: Setup, tokens: int) -> int:
    """What the experts of a layer keep: their share of tokens is filled up to whole products."""
    sent = layer.chosen * tokens
    filled = sent + min(layer.count, sent) * TILE // 2
    # Both factors and the activation; the outcome of each choice, and where it came from.
    outcomes = (setup.rest * layer.hidden + 3 * 8) * sent
    return 3 * setup.compute * layer.intermediate * filled + outcomes + 4 * layer.count * tokens


def activation_bytes(shape: ModelShape, setup: Setup, *, tokens: int, checkpointing: bool) -> int:
    """The same at its peak: with checkpointing, one layer at a time is there as a whole."""
    kept = kept_bytes(shape, setup, tokens=tokens, checkpointing=checkpointing)
    if checkpointing:
        kept += tokens * kept_per_token(shape, setup) // shape.layers
        experts = [_kept_by_experts(layer, setup, tokens) for layer in shape.experts]
        kept += max(experts, default=0)
    return kept


def loss_bytes(shape: ModelShape, setup: Setup, *, labels: int) -> int:
    """Hidden states of labelled tokens with their gradients, and one chunk of logits."""
    chunk = min(CHUNK_BYTES, 4 * shape.vocab * labels)
    return 2 * setup.compute * shape.hidden * labels + 3 * chunk


def _adapted_inputs(shape: ModelShape, setup: Setup) -> int:
    """Inputs of adapted layers and their inner products, for one token."""
    c, e = setup.compute, setup.rest
    total = 0
    seen: set[tuple[str, str]] = set()
    for name, ((r, _), (rows, _)) in setup.adapters(shape).items():
        total += c * (r + rows if setup.use_dora else r)
        parent, _, leaf = name.rpartition(".")
        group = (parent, _SHARED.get(leaf, leaf))
        if group not in seen:
            seen.add(group)
            total += (e if leaf in _SHARED else c) * shape.linears[name][1]
    return total
