"""What a run will ask of the kernels, so that they can be tried before it begins."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.kernels import choice
from halfbyte.kernels.choice import PLAIN

_KERNELS = Path(__file__).parent.parent
SETS = {"all": choice.ALL, "element-wise": choice.ELEMENTWISE}

# Groups of layers that share an input, each with the kernels that adapters need there.
_BY_GROUP = ("lora_grads", "lora_down", "lora_grad_input")
# In the order in which they are begun: what takes longest to compile comes first.
_ORDER = (
    *("attention_backward", "attention", *_BY_GROUP, "adamw", "head_loss", "rms_norm_backward"),
    *(
        "rms_norm",
        "gated_backward",
        "dequantize",
        "rope",
        "gated",
        "dropout_keys",
        "apply_dropout",
        "fold_b",
    ),
)


@dataclass(frozen=True)
class GroupShape:
    """Linear layers with the same input, as one product: see :mod:`halfbyte.kernels.lora_group`."""

    kind: str  # "qkv", "o", "gate_up" or "down"
    columns: int  # of the input
    extra: int  # columns that the adapters add
    rows: tuple[int, ...]  # of each layer
    adapted: tuple[int, ...]  # which of the layers have an adapter


@dataclass(frozen=True)
class BatchShape:
    """What of a batch decides how a kernel is launched."""

    tokens: int
    rows: int
    max_seqlen: int


@dataclass(frozen=True)
class TrialSpec:
    """Everything that a kernel's launch parameters follow from, as plain values."""

    device: str  # "cuda:0"
    kernels: str  # one of SETS
    compute_dtype: str  # "bfloat16"
    stream_dtype: str  # of the residual stream and of the norms
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]  # of attention
    activation: str
    softcap: float | None
    groups: tuple[GroupShape, ...]  # all that differ
    rank: int
    scale: float
    dropout: float
    modules: int  # adapters in the model
    block_size: int
    double_quantization: bool
    moments_8bit: bool  # whether the optimizer has any
    parameters_32bit: int  # how many of its parameters have moments in 32 bits
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    batches: tuple[BatchShape, ...]  # that are trained on
    evaluated: tuple[BatchShape, ...]  # that are only read

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TrialSpec:
        found: dict[str, Any] = json.loads(text)
        for group in found["groups"]:
            group["rows"], group["adapted"] = tuple(group["rows"]), tuple(group["adapted"])
        found["groups"] = tuple(GroupShape(**group) for group in found["groups"])
        for name in ("batches", "evaluated"):
            found[name] = tuple(BatchShape(**batch) for batch in found[name])
        for name in ("windows", "betas"):
            found[name] = tuple(found[name])
        return cls(**found)

    def fingerprint(self, *versions: str) -> str:
        """Of the spec, of ``versions`` and of the kernels' source."""
        digest = hashlib.sha256(self.to_json().encode())
        for file in sorted(_KERNELS.rglob("*.py")):
            digest.update(file.read_bytes())
        digest.update("\n".join(versions).encode())
        return digest.hexdigest()[:32]


def trial_tasks(spec: TrialSpec) -> list[str]:
    """What is tried, each by itself: a kernel, or ``kernel.group`` where it depends on a group."""
    found = []
    for name in _ORDER:
        if getattr(SETS[spec.kernels], name) is getattr(PLAIN, name):
            continue  # PyTorch's own operations already
        if name == "apply_dropout" and spec.kernels == "all":
            continue  # fused layers apply their masks within lora_*
        if name in _BY_GROUP:
            numbers = [number for number, group in enumerate(spec.groups) if group.adapted]
            found += [f"{name}.{number}" for number in numbers]
        else:
            found.append(name)
    return found


def kernel_of(task: str) -> str:
    """The kernel that a task tries."""
    return task.partition(".")[0]
