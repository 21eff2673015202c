"""The kernels of a run, tried while its model is loaded."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from halfbyte.evaluate.held_out import TOKENS_AT_ONCE, groups_of
from halfbyte.events.types import Fallback
from halfbyte.kernels import triton_shim
from halfbyte.kernels.cache import cache_name, use_cache
from halfbyte.kernels.choice import ALL, Kernels, choose_kernels
from halfbyte.kernels.trial.processes import Trial, in_use, start_trial, without
from halfbyte.kernels.trial.spec import SETS, BatchShape, GroupShape, TrialSpec
from halfbyte.model.fusable import ACTIVATIONS, why_adapters_not_fused
from halfbyte.model.lora_targets import adapter_ranks, adapter_scales, choose_targets
from halfbyte.optim.flat import BLOCK, MIN_8BIT_SIZE
from halfbyte.plan.device import Device
from halfbyte.quant.joined import extra_columns
from halfbyte.recipe.schema import LoraRecipe
from halfbyte.run.assembly import Assembly
from halfbyte.run.precision import DTYPES
from halfbyte.run.record import RunRecord

Key = TypeVar("Key")

FAMILIES = ("llama", "mistral", "qwen2")  # whose layers can be fused
MOST_WORKERS = 8
# What a process takes of a GPU's memory, its context and the kernels' inputs together.
WORKER_BYTES = 1 << 30
_PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@contextmanager
def kernel_trial(assembly: Assembly, record: RunRecord) -> Iterator[Trial | None]:
    """A trial of the run's kernels, begun; None where there is nothing to try.

    On a GPU also decides where compiled kernels are kept, so it comes before the first of them.
    """
    if assembly.device.kind == "cpu":
        yield None
        return
    capability = torch.cuda.get_device_capability()
    triton = importlib.metadata.version("triton") if triton_shim.INSTALLED else "none"
    name = cache_name(triton, torch.__version__, capability, torch.cuda.get_device_name())
    cache = use_cache(name)
    if cache.temporary_because:
        record(Fallback("compiled kernels kept for this run alone", cache.temporary_because))
    spec = trial_spec(assembly, f"cuda:{torch.cuda.current_device()}")
    if spec is None:
        yield None
        return
    limited = assembly.recipe.memory_limit_gb is not None
    workers = 1 if limited else _workers(assembly.device)
    with start_trial(spec, cache.path, workers=workers) as trial:
        if limited:
            trial.finish()  # a process takes memory: before the model has any
        yield trial


def passed(trial: Trial | None, kernels: Kernels, record: RunRecord) -> Kernels:
    """``kernels`` without those that the trial has found wanting, each of which is told of."""
    if trial is None:
        return kernels
    tried, outcome = SETS[trial.spec.kernels], trial.finish()
    for (other, reason), names in _alike(
        (
            ("memory-efficient attention", outcome.replaced[name])
            if name.startswith("attention") and kernels.attention is ALL.attention
            else ("PyTorch's own operations", outcome.replaced[name]),
            name,
        )
        for name in in_use(kernels, tried, outcome.replaced)
    ):
        what = "kernel" if len(names) == 1 else "kernels"
        record(Fallback(f"{other} in place of the {what} {', '.join(names)}", reason))
    for reason, names in _alike(
        (outcome.untried[name], name) for name in in_use(kernels, tried, outcome.untried)
    ):
        record(Fallback(f"kernels used without a trial: {', '.join(names)}", reason))
    return without(kernels, tried, outcome.replaced)


def _alike(found: Iterable[tuple[Key, str]]) -> Iterable[tuple[Key, list[str]]]:
    """The names under each key: without a C compiler, say, all kernels fail for one reason."""
    names: dict[Key, list[str]] = {}
    for key, name in found:
        names.setdefault(key, []).append(name)
    return names.items()


def trial_spec(assembly: Assembly, device: str) -> TrialSpec | None:
    """What the run will ask of the kernels; None where it has none or its layers stay as they are.

    From the configuration alone, in a few milliseconds.
    """
    recipe, training = assembly.recipe, assembly.recipe.training
    kernels, _ = choose_kernels(assembly.device.capability)
    name = next((name for name, found in SETS.items() if found is kernels), None)
    config = assembly.source.config.get_text_config()
    if name is None or config.model_type not in FAMILIES:
        return None
    if config.hidden_act not in ACTIVATIONS or assembly.buckets is None:
        return None
    compute = str(DTYPES[str(recipe.precision)]).removeprefix("torch.")
    adapters = _adapters(config, recipe.lora)
    if adapters is None or recipe.model.new_tokens:
        return None
    chosen, r, scale = adapters
    groups, modules, sizes = _groups(config, r, chosen)
    small = sum(size for size in sizes if size < MIN_8BIT_SIZE)
    large = sum(-(-size // BLOCK) * BLOCK for size in sizes if size >= MIN_8BIT_SIZE)
    eight_bits = training.optimizer != "adamw"
    heads, kv_heads, head_dim = _heads(config)
    return TrialSpec(
        device=device,
        kernels=name,
        compute_dtype=compute,
        stream_dtype="float32" if recipe.quantization.upcast_rest else compute,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        windows=_windows(config),
        activation=ACTIVATIONS[config.hidden_act],
        softcap=getattr(config, "final_logit_softcapping", None),
        groups=groups,
        rank=r,
        scale=scale,
        dropout=float(recipe.lora.lora_dropout),
        modules=modules,
        block_size=recipe.quantization.block_size,
        double_quantization=recipe.quantization.double_quant,
        moments_8bit=eight_bits and large > 0,
        parameters_32bit=small if eight_bits else small + large,
        betas=(float(training.adam_beta1), float(training.adam_beta2)),
        epsilon=float(training.adam_epsilon),
        weight_decay=float(training.weight_decay),
        batches=tuple(
            BatchShape(
                bucket.tokens,
                assembly.batches.capacity + -(-bucket.tokens // bucket.max_seqlen),
                bucket.max_seqlen,
            )
            for bucket in assembly.buckets
        ),
        evaluated=_evaluated(assembly),
    )


def _adapters(config: Any, lora: LoraRecipe) -> tuple[set[str], int, float] | None:
    """Names of the adapted layers, their rank and their factor; None where they are not fused."""
    names = [
        f"model.layers.{layer}.{part}"
        for layer in range(config.num_hidden_layers)
        for parts in _PARTS.values()
        for part in parts
    ]
    chosen = choose_targets(names, lora.target_modules, lora.exclude_modules)
    ranks = adapter_ranks(chosen, lora.r, lora.rank_pattern)
    scales = adapter_scales(ranks, float(lora.lora_alpha), lora.alpha_pattern, lora.use_rslora)
    if lora.modules_to_save or (
        why_adapters_not_fused(ranks.values(), scales.values(), lora.use_dora) is not None
    ):
        return None
    return set(chosen), ranks[chosen[0]], scales[chosen[0]]


def _groups(config: Any, r: int, chosen: set[str]) -> tuple[tuple[GroupShape, ...], int, list[int]]:
    """The groups that differ, how many modules are adapted, and the elements of each A and B."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    heads, kv_heads, head_dim = _heads(config)
    inputs = {"qkv": hidden, "o": heads * head_dim, "gate_up": hidden, "down": intermediate}
    rows = {
        "qkv": (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim),
        "o": (hidden,),
        "gate_up": (intermediate, intermediate),
        "down": (hidden,),
    }
    found: dict[GroupShape, None] = {}
    sizes: list[int] = []
    for layer in range(config.num_hidden_layers):
        for kind, parts in _PARTS.items():
            adapted = tuple(
                i for i, part in enumerate(parts) if f"model.layers.{layer}.{part}" in chosen
            )
            extra = extra_columns(inputs[kind], len(adapted), r)
            found[GroupShape(kind, inputs[kind], extra, rows[kind], adapted)] = None
            for i in adapted:
                sizes += [r * inputs[kind], rows[kind][i] * r]
    return tuple(found), len(chosen), sizes


def _heads(config: Any) -> tuple[int, int, int]:
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return heads, kv_heads, int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def _windows(config: Any) -> tuple[int | None, ...]:
    """The windows of attention that differ, as :mod:`halfbyte.model.fused` reads them."""
    if config.model_type == "llama":
        return (None,)
    window = getattr(config, "sliding_window", None)
    if config.model_type == "mistral":
        return (window,)
    kinds = dict.fromkeys(config.layer_types)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _evaluated(assembly: Assembly) -> tuple[BatchShape, ...]:
    """The shapes of held-out batches, as far as a launch depends on them."""
    found: dict[BatchShape, None] = {}
    for group in groups_of(assembly.data.held_out, TOKENS_AT_ONCE):
        lengths = [len(row) for row in group]
        tokens, longest = (-(-n // 64) * 64 for n in (sum(lengths), max(lengths)))
        # Kernels for up to 128 rows are the same.
        found[BatchShape(tokens, len(group) if len(group) > 128 else 2, longest)] = None
    return tuple(found)


def _workers(device: Device) -> int:
    """As many as compile at once without crowding out the model that is loaded beside them."""
    return max(1, min(MOST_WORKERS, device.threads, device.free_bytes // 4 // WORKER_BYTES))
