"""Counts and shapes of a model from its configuration, without a weight in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.model.bnb_checkpoint import StoredNF4
from halfbyte.model.experts import DOWN, find_experts
from halfbyte.model.fusable import NOT_ALL_IN_NF4, why_not_fused
from halfbyte.model.lora_targets import Targets, adapter_ranks, choose_targets
from halfbyte.model.narrow import can_be_narrow
from halfbyte.model.skeleton import build_skeleton, quantized_linears
from halfbyte.model.trained_rows import EMBEDDING, HEAD

_STORED = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class ExpertShape:
    """The experts of one layer: ``count`` of them, of which each token is sent to ``chosen``.

    Each has [2 · ``intermediate``, ``hidden``] and [``hidden``, ``intermediate``].
    """

    count: int
    chosen: int
    intermediate: int
    hidden: int

    @property
    def matrices(self) -> tuple[int, int]:
        """Parameters of the two matrices of one expert."""
        return 2 * self.intermediate * self.hidden, self.intermediate * self.hidden

    @property
    def parameters(self) -> int:
        return self.count * sum(self.matrices)


@dataclass(frozen=True)
class TrainedEnd:
    """Trained rows of the embedding or the head: elements, and whether their state is in fp32."""

    elements: int
    full_state: bool


@dataclass(frozen=True)
class ModelShape:
    """What the memory and the time of a step depend on.

    ``linears`` gives (out, in) of every linear layer but the head, by full name; all are stored in
    4 bits but what a checkpoint that is in 4 bits already has ``left_out``. ``rest``
    counts all other parameters (norms, embeddings, head, biases), tied ones once; ``head`` those
    of the output head alone, whether tied or not; ``ends`` those of embedding and head, tied ones
    once, if :mod:`halfbyte.model.narrow` can keep them in 16 bits.
    """

    linears: dict[str, tuple[int, int]]
    rest: int
    head: int
    ends: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_width: int  # widths of the inputs of all norms together, per token
    max_length: int | None  # the model's own limit in tokens
    stored: str | None  # the type that the weights are said to be stored in: "bf16", "fp16", "fp32"
    not_fused: str | None  # why its layers cannot be fused, or None
    left_out: frozenset[str] = frozenset()  # of ``linears``, those kept in 16 bits
    experts: tuple[ExpertShape, ...] = ()  # of each layer that has some
    experts_left_out: bool = False  # whether those too are kept in 16 bits
    experts_named: tuple[str, ...] = ()  # the modules that hold them
    tied: bool = False  # the head is the embedding

    @property
    def linear(self) -> int:
        """Parameters of the linear layers."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @property
    def in_experts(self) -> int:
        """Parameters of all experts."""
        return sum(layer.parameters for layer in self.experts)

    @property
    def frozen(self) -> int:
        return self.linear + self.in_experts + self.rest

    @property
    def mlp_width(self) -> int:
        """Elements of one factor of all gated MLPs together, experts apart."""
        halves = {"up_proj": 1, "gate_up_proj": 2}
        widths = [
            rows // halves[leaf]
            for name, (rows, _) in self.linears.items()
            if (leaf := name.rpartition(".")[2]) in halves
        ]
        return sum(widths) or self.intermediate * (self.layers - len(self.experts))

    @property
    def largest_linear(self) -> int:
        return max(rows * columns for rows, columns in self.linears.values())

    def adapter_shapes(
        self,
        r: int,
        target_modules: Targets,
        exclude_modules: Targets = (),
        rank_pattern: Mapping[str, int] | None = None,
    ) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
        """Shapes of A [r, in] and B [out, r] of each adapted layer, by its full name.

        Raises ModelError for a target or a pattern that fits no layer of the model.
        """
        chosen = choose_targets(self.linears, target_modules, exclude_modules)
        return {
            name: ((rank, self.linears[name][1]), (self.linears[name][0], rank))
            for name, rank in adapter_ranks(chosen, r, rank_pattern).items()
        }

    def trained_rows(
        self, modules_to_save: Collection[str], new_tokens: int
    ) -> tuple[TrainedEnd, ...]:
        """What is trained of embedding and head; of a matrix that is both, once."""
        found = []
        for name in (EMBEDDING, HEAD)[: 1 if self.tied else 2]:
            whole = bool(modules_to_save) if self.tied else name in modules_to_save
            rows = self.vocab if whole else new_tokens
            if rows:
                found.append(TrainedEnd(rows * self.hidden, whole and name == EMBEDDING))
        return tuple(found)

    def trainable(self, r: int, target_modules: Targets) -> int:
        """Parameters of the adapter: r · (in + out) for each adapted layer."""
        shapes = self.adapter_shapes(r, target_modules)
        return sum(a[0] * a[1] + b[0] * b[1] for a, b in shapes.values())


def model_shape(
    config: Any, name: str = "the model", stored: StoredNF4 | None = None
) -> ModelShape:
    """The shape of the causal LM that ``config`` (of transformers) describes.

    ``stored`` says what of it is in 4 bits already, if anything is.
    The model is built on the meta device, so that what is counted is what transformers builds.
    Raises ModelError for a configuration of which no model that halfbyte trains can be built.
    """
    model = build_skeleton(config, name)
    linears = quantized_linears(model)
    parameters = {id(p): p.numel() for p in model.parameters()}
    text = model.config.get_text_config()
    experts = _expert_shapes(model, int(getattr(text, "num_experts_per_tok", None) or 1))
    elsewhere = sum(linear.weight.numel() for linear in linears.values())
    elsewhere += sum(layer.parameters for layer in experts)
    head = model.get_output_embeddings()
    heads = int(getattr(text, "num_attention_heads", 1) or 1)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    hidden = int(text.hidden_size)
    widths = [max(linear.weight.shape) for linear in linears.values()]
    left_out = [n for n in linears if stored and f"{n}.weight" not in stored.quantized]
    ends = [model.get_submodule(end).weight for end in can_be_narrow(model)]
    return ModelShape(
        linears={n: (m.weight.shape[0], m.weight.shape[1]) for n, m in linears.items()},
        rest=sum(parameters.values()) - elsewhere,
        head=0 if head is None else head.weight.numel(),
        ends=sum({id(weight): weight.numel() for weight in ends}.values()),
        layers=int(text.num_hidden_layers),
        hidden=hidden,
        intermediate=int(getattr(text, "intermediate_size", None) or max(widths)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=int(getattr(text, "head_dim", None) or hidden // heads),
        vocab=int(text.vocab_size),
        norm_width=_norm_width(model, heads, kv_heads),
        max_length=getattr(text, "max_position_embeddings", None),
        stored=_stored(config) or _stored(text),
        not_fused=why_not_fused(model) or (NOT_ALL_IN_NF4 if left_out else None),
        left_out=frozenset(left_out),
        experts=experts,
        experts_left_out=stored is not None,
        experts_named=tuple(find_experts(model)),
        tied=head is not None and head.weight is model.get_input_embeddings().weight,
    )


def _expert_shapes(model: Any, chosen: int) -> tuple[ExpertShape, ...]:
    shapes = [module.get_parameter(DOWN).shape for module in find_experts(model).values()]
    return tuple(ExpertShape(count, chosen, width, hidden) for count, hidden, width in shapes)


def _stored(config: Any) -> str | None:
    return _STORED.get(str(getattr(config, "dtype", None)).removeprefix("torch."))


def _norm_width(model: Any, heads: int, kv_heads: int) -> int:
    """What all norms read of one token, in elements; a head's own norm reads all heads."""
    total = 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not type(module).__name__.endswith("Norm") or weight is None:
            continue
        times = {"q_norm": heads, "k_norm": kv_heads}.get(name.rpartition(".")[2], 1)
        total += weight.numel() * times
    return total
