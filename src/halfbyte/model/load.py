"""Load a base model into 4 bits, one tensor at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import ModelError
from halfbyte.model.experts import DOWN, UP, NF4Experts, expert_name, find_experts
from halfbyte.model.free_memory import release_free_memory
from halfbyte.model.lora_init import QuantizeHook
from halfbyte.model.narrow import can_be_narrow, make_narrow
from halfbyte.model.skeleton import build_skeleton, make_buffers, quantized_linears
from halfbyte.model.source import ModelSource
from halfbyte.model.wording import some
from halfbyte.quant.dense import DenseWeight
from halfbyte.quant.linear import QLoRALinear
from halfbyte.quant.nf4 import NF4Memory, NF4Weight, quantize_nf4
from halfbyte.recipe.schema import QuantizationRecipe

_RELEASE_EVERY = 32 << 20  # bytes of 16-bit weights


@dataclass(frozen=True)
class LoadedBase:
    """A transformers causal LM whose linear layers, the head excepted, are ``QLoRALinear``.

    The experts of a mixture are ``NF4Experts``.
    """

    model: Any
    parameters: int  # frozen, in the shapes before packing, tied ones once
    bytes_before: int  # of the weights that are quantized, at 16 bits each
    bytes_after: int  # of the same in NF4, scales included
    bytes_other: int  # norms, embeddings, head, biases and what its checkpoint left in 16 bits
    quantized_modules: int


@torch.no_grad()
def load_base(
    source: ModelSource,
    *,
    quantization: QuantizationRecipe,
    device: str,
    compute_dtype: torch.dtype,
    rest_dtype: torch.dtype,
    hook: QuantizeHook | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedBase:
    """Read and quantize the model of ``source`` on ``device``, or take it as it is quantized.

    Each linear layer's weight is moved to the device in the type that it is stored in, quantized
    there and dropped before the next is read, so the 16-bit model never stands whole in memory.
    Their biases are kept in ``compute_dtype``; norms, embeddings and the head in ``rest_dtype``,
    and a head that is the embedding is kept once. An embedding and a head that are stored in
    ``compute_dtype`` stay in it and are widened where they are used: the same numbers. Of a
    checkpoint that is in NF4 already the codes and scales are kept bit for bit, whatever
    ``quantization`` says, and the linear layers that it left out are kept in ``compute_dtype``.
    A ``hook`` is asked how each linear layer's weight is quantized, experts' are not among them.
    ``progress`` hears how many of how many matrices are done; with a hook, which takes most of the
    time, those of experts do not count.

    Raises ModelError for tensors that are missing, too many, or of a wrong shape or type.
    """
    if hook is not None and source.stored_nf4 is not None:
        raise ModelError(
            f"the weights of {source.name} are in 4 bits already, and what lora.init makes of the "
            "original ones cannot be made: leave it out, or name the model's original."
        )
    model = build_skeleton(source.config, source.name)
    linears = quantized_linears(model)
    _untie_what_differs(model, source)
    _require_complete(model, source)
    parameters = sum(p.numel() for p in model.parameters())
    _require_likely(parameters, source)
    before = after = left_out = quantized = unreleased = 0
    mixtures = find_experts(model)
    counted = {} if hook is not None else {n: _matrices(m) for n, m in mixtures.items()}
    done, total = 0, len(linears) + sum(counted.values())
    for name, module in mixtures.items():
        experts = _load_experts(source, name, module, quantization, device, compute_dtype)
        for matrix in experts.all_matrices:
            if isinstance(matrix, NF4Weight):
                before, after = before + 2 * math.prod(matrix.shape), after + matrix.nbytes
                quantized += 1
            else:
                left_out += matrix.nbytes
        model.set_submodule(name, experts.eval())
        release_free_memory()
        done += counted.get(name, 0)
        if progress is not None and done:
            progress(done, total)
    for name, linear, memory in _with_memory(linears, source, quantization, device):
        base: NF4Weight | DenseWeight
        if memory is None:
            base = DenseWeight(
                _read(source, f"{name}.weight", linear.weight, compute_dtype).to(device)
            )
            left_out += base.nbytes
        else:
            full = f"{name}.weight"
            base = _quantized(source, full, linear.weight, memory, quantization, device, hook)
            before += 2 * linear.weight.numel()
            after += base.nbytes
            quantized += 1
        bias = None
        if linear.bias is not None:
            bias = _read(source, f"{name}.bias", linear.bias, compute_dtype).to(device)
        layer = QLoRALinear.from_weight(
            base, bias, linear.in_features, linear.out_features, compute_dtype
        )
        model.set_submodule(name, layer.eval())
        done += 1
        if progress is not None:
            progress(done, total)
        unreleased += 2 * linear.weight.numel()
        if unreleased > _RELEASE_EVERY:
            release_free_memory()
            unreleased = 0
    release_free_memory()
    _fill_rest(model, source, device, rest_dtype, compute_dtype)
    make_buffers(model, device)
    kept = {id(t): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    other = left_out + sum(kept.values())
    return LoadedBase(model, parameters, before, after, other, quantized)


def _require_likely(parameters: int, source: ModelSource) -> None:
    """Memory is taken by the configuration's figures, so that they must fit the files' sizes.

    The narrowest of GGUF's formats takes 1.56 bits for a parameter.
    """
    if parameters > 8 * source.checkpoint.file_bytes:
        raise ModelError(
            f"the configuration of {source.name} speaks of {parameters:,} parameters and its "
            f"weights are {source.checkpoint.file_bytes:,} bytes: the two do not fit each other."
        )


def _matrices(module: Any) -> int:
    """How many matrices the experts of ``module`` have."""
    return sum(len(module.get_parameter(leaf)) for leaf in (UP, DOWN))


def _load_experts(
    source: ModelSource,
    name: str,
    module: Any,
    quantization: QuantizationRecipe,
    device: str,
    compute_dtype: torch.dtype,
) -> NF4Experts:
    """Each expert's matrices quantized by themselves; bitsandbytes leaves them as they are."""
    matrices: dict[str, list[NF4Weight | DenseWeight]] = {UP: [], DOWN: []}
    for leaf, found in matrices.items():
        expected = module.get_parameter(leaf)
        memory = None
        if source.stored_nf4 is None:
            sizes = [one.numel() for one in expected]
            memory = NF4Memory(sizes, quantization.block_size, quantization.double_quant, device)
        for number, one in enumerate(expected):
            full = expert_name(f"{name}.{leaf}", number)
            if memory is None:
                found.append(DenseWeight(_read(source, full, one, compute_dtype).to(device)))
            else:
                found.append(_quantized(source, full, one, memory, quantization, device))
    return NF4Experts(matrices[UP], matrices[DOWN], module._apply_gate, compute_dtype)


def _with_memory(
    linears: dict[str, nn.Linear],
    source: ModelSource,
    quantization: QuantizationRecipe,
    device: str,
) -> Iterator[tuple[str, nn.Linear, NF4Memory | None]]:
    """Name, layer, and where its codes go: next to those of its module, with which it may be
    joined. None where its checkpoint leaves it out."""
    stored = source.stored_nf4
    how = quantization if stored is None else stored
    modules: dict[str, list[str]] = {}
    for name in linears:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    for names in modules.values():
        left_out = {n for n in names if stored and f"{n}.weight" not in stored.quantized}
        sizes = [linears[name].weight.numel() for name in names if name not in left_out]
        memory = NF4Memory(sizes, how.block_size, how.double_quant, device)
        for name in names:
            yield name, linears[name], None if name in left_out else memory


def _quantized(
    source: ModelSource,
    name: str,
    expected: Tensor,
    memory: NF4Memory,
    quantization: QuantizationRecipe,
    device: str,
    hook: QuantizeHook | None = None,
) -> NF4Weight:
    if source.stored_nf4 is None:
        original = _read(source, name, expected).to(device)
        quantize = partial(
            quantize_nf4,
            block_size=quantization.block_size,
            double_quant=quantization.double_quant,
            memory=memory,
        )
        if hook is None:
            return quantize(original)
        return hook(name.removesuffix(".weight"), original, quantize)
    weight = source.nf4(name)
    if weight.shape != tuple(expected.shape):
        raise _do_not_fit(source, name, f"NF4 {list(weight.shape)}", expected)
    return memory.place(weight)


def _untie_what_differs(model: Any, source: ModelSource) -> None:
    """Where a checkpoint holds a head of its own, a configuration that ties it is wrong.

    transformers decides the same way when it loads.
    """
    there = set(source.names())
    named: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in there:
            named.setdefault(id(parameter), []).append(name)
    for first, *others in named.values():
        for name in others:
            if torch.equal(source.read(first), source.read(name)):
                continue
            owner, _, leaf = name.rpartition(".")
            shape = model.get_parameter(name)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(torch.empty_like(shape)))
            model.config.tie_word_embeddings = False


def _fill_rest(
    model: Any, source: ModelSource, device: str, dtype: torch.dtype, compute_dtype: torch.dtype
) -> None:
    """Read what is no linear layer; parameters that are one object stay one."""
    filled: dict[int, nn.Parameter] = {}
    there = set(source.names())
    ends = can_be_narrow(model) if dtype.itemsize > compute_dtype.itemsize else {}
    narrow = []
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) in filled or name not in there:
            continue
        owner = name.rpartition(".")[0]
        value = _read(source, name, parameter, None if owner in ends else dtype).to(device)
        if value.dtype == compute_dtype and owner in ends:
            shared = [n for n, end in ends.items() if end.weight is parameter]
            narrow += [n for n in shared if n not in narrow]
        else:
            value = value.to(dtype)
        filled[id(parameter)] = nn.Parameter(value, requires_grad=False)
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in filled:
                setattr(module, leaf, filled[id(parameter)])
    make_narrow(model, narrow, dtype)
    for name, buffer in list(model.named_buffers()):
        if name in there and buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            value = _read(source, name, buffer, buffer.dtype).to(device)
            setattr(model.get_submodule(owner), leaf, value)


def _read(
    source: ModelSource, name: str, expected: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    tensor = source.read(name, dtype)
    if tensor.shape != expected.shape or (
        tensor.is_floating_point() != expected.is_floating_point()
    ):
        raise _do_not_fit(source, name, _form(tensor), expected)
    return tensor


def _do_not_fit(source: ModelSource, name: str, form: str, expected: Tensor) -> ModelError:
    return ModelError(
        f"tensor {name} of {source.name} is {form} where its configuration asks for "
        f"{_form(expected)}: the two do not fit each other."
    )


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _require_complete(model: Any, source: ModelSource) -> None:
    """Every tensor of the model is in the checkpoint, and nothing else of weight is."""
    there = set(source.names())
    wanted: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        wanted.setdefault(id(tensor), []).append(name)
    # Of parameters that are one object, one name in the checkpoint is enough.
    missing = [names[0] for names in wanted.values() if not there.intersection(names)]
    missing = _not_ignored(missing, model._keys_to_ignore_on_load_missing)
    if missing:
        raise ModelError(
            f"the weights of {source.name} lack {some(missing)}, which {type(model).__name__} "
            "needs: they are not this model's, or not all of them."
        )
    # Old checkpoints hold buffers that are computed today.
    computed = [r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.attn\.(masked_)?bias$"]
    ignored = [*computed, *(model._keys_to_ignore_on_load_unexpected or [])]
    unexpected = _not_ignored(sorted(there - set(state)), ignored)
    if unexpected:
        raise ModelError(
            f"the weights of {source.name} hold {some(unexpected)}, which {type(model).__name__} "
            "has no place for: they are not this model's."
        )


def _not_ignored(names: Iterable[str], patterns: Iterable[str] | None) -> list[str]:
    patterns = list(patterns or [])
    return [n for n in names if not any(re.search(pattern, n) for pattern in patterns)]
