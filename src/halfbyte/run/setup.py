"""The model, its adapter and its optimizer, ready for step 1."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.data.batch import Batch, Bucket
from halfbyte.engine.capture import CapturedStep
from halfbyte.engine.products import choose_libraries, read_choices, write_choices
from halfbyte.engine.result import StepResult
from halfbyte.engine.scaler import LossScaler
from halfbyte.engine.step import TrainStep
from halfbyte.events.types import Choice, Fallback, ModelLoaded
from halfbyte.kernels.cache import VARIABLE as CACHE_VARIABLE
from halfbyte.kernels.choice import PLAIN, Kernel, Kernels, choose_kernels
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.fused import FusedNetwork, NotFusedError
from halfbyte.model.load import load_base
from halfbyte.model.lora import attach_lora
from halfbyte.model.source import ModelSource
from halfbyte.model.varlen import NoKernelError
from halfbyte.optim.choose import make_optimizer
from halfbyte.optim.flat import FlatParameters, flatten_parameters
from halfbyte.optim.schedule import schedule_table
from halfbyte.plan.device import Device
from halfbyte.quant.joined import FlatAdapter
from halfbyte.recipe import Recipe
from halfbyte.run.assembly import Assembly
from halfbyte.run.record import RunRecord

_NO_GRAPH = "each step launched kernel by kernel, in place of a CUDA graph"

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Trainer:
    """All that training changes, and the step that changes it.

    ``take_step(number, micro_batches)`` is ``step``, or the graphs that it was captured in.
    """

    model: QLoRAModel
    parameters: FlatParameters
    optimizer: Any
    scaler: LossScaler
    step: TrainStep
    take_step: Callable[[int, Sequence[Batch]], StepResult]

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, by name; views, not copies."""
        return {
            **{f"adapter.{n}": p.detach() for n, p in self.model.lora_parameters().items()},
            **{f"optimizer.{n}": t for n, t in self.optimizer.state_tensors().items()},
            **self.scaler.state_tensors(),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put back what ``state`` gave, from tensors on any device."""
        self.load_adapter(state)
        prefix = "optimizer."
        self.optimizer.load_state_tensors(
            {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        )
        self.scaler.load_state_tensors(state)

    def adapter(self) -> dict[str, Tensor]:
        """A copy of the adapter's weights, named as in ``state``."""
        return {n: t.clone() for n, t in self.state().items() if n.startswith("adapter.")}

    @torch.no_grad()
    def load_adapter(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.model.lora_parameters().items():
            parameter.copy_(state[f"adapter.{name}"])
        self.model.adapter_changed()


def load_model(
    recipe: Recipe,
    source: ModelSource,
    device: Device,
    *,
    keep_copy: bool,
    record: RunRecord | None = None,
) -> tuple[QLoRAModel, ModelLoaded]:
    """Quantize the base as it is read and attach a fresh adapter.

    ``recipe`` is effective. With ``keep_copy`` every linear layer also keeps its weight
    dequantized. With a ``record`` the model is to be trained: on a GPU its layers are fused if
    they can be, and the record hears how that was decided.
    """
    compute_dtype = DTYPES[str(recipe.precision)]
    rest_dtype = torch.float32 if recipe.quantization.upcast_rest else compute_dtype
    loaded = load_base(
        source,
        quantization=recipe.quantization,
        device=device.kind,
        compute_dtype=compute_dtype,
        rest_dtype=rest_dtype,
    )
    lora = attach_lora(
        loaded.model,
        r=recipe.lora.r,
        lora_alpha=float(recipe.lora.lora_alpha),
        lora_dropout=float(recipe.lora.lora_dropout),
        target_modules=recipe.lora.target_modules,
        seed=recipe.seed,
    )
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    for layer in lora.values():
        assert layer.lora_A is not None
        assert layer.lora_B is not None
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    model = QLoRAModel(loaded.model, lora, compute_dtype)
    if record is not None and device.kind == "cuda":
        _fuse(model, device, record)
    copied = 0
    if model.fused is not None:
        copied = model.fused.keep_copies() if keep_copy else model.fused.use_scratch()
    elif keep_copy:
        copied = sum(layer.keep_dense() for layer in model.linears.values())
    names = [name.rsplit(".", 1)[-1] for name in lora]
    return model, ModelLoaded(
        name=source.name,
        architecture=type(loaded.model).__name__,
        parameters_base=loaded.parameters,
        parameters_trainable=sum(p.numel() for p in model.lora_parameters().values()),
        layers=source.config.get_text_config().num_hidden_layers,
        bytes_before=loaded.bytes_before,
        bytes_after=loaded.bytes_after,
        bytes_other=loaded.bytes_other,
        bytes_copy=copied,
        quantized_modules=loaded.quantized_modules,
        lora_modules={name: names.count(name) for name in dict.fromkeys(names)},
        source_format=source.format,
        template_of_base=source.chat_template is not None,
        licence=source.licence,
    )


def _fuse(model: QLoRAModel, device: Device, record: RunRecord) -> None:
    """Give ``model`` fused layers, or at least kernels for its own; say why where not."""
    kernels, words = choose_kernels(device.capability)
    try:
        model.fused = FusedNetwork(model.network, model.head, model.compute_dtype, kernels)
    except NotFusedError as error:
        record(Fallback("layers as transformers has them, in place of fused ones", str(error)))
        try:
            if kernels.attention is PLAIN.attention:
                raise NoKernelError(words) from error
            model.use_kernels(kernels)
        except NoKernelError as missing:
            record(Fallback("attention row by row, in place of a kernel for all", str(missing)))
            return
    record(Choice("kernels", None, words, f"what {device.name} runs"))


def make_trainer(assembly: Assembly, model: QLoRAModel) -> Trainer:
    """The optimizer, the schedule and the step of a run at its beginning."""
    recipe, training = assembly.recipe, assembly.recipe.training
    parameters = flatten_parameters(model.lora_parameters())
    kernels, _ = choose_kernels(assembly.device.capability)
    if model.fused is not None:
        kernels = model.fused.kernels
        shadow = parameters.data.to(model.compute_dtype)
        model.fused.attach(_flat_adapter(model, parameters, shadow))
    optimizer = make_optimizer(training.optimizer, parameters, training, use_kernels=kernels.adamw)
    dropout_keys = _dropout_on_device(model, kernels)
    scaler = LossScaler(recipe.precision == "fp16", model.device)
    rates = schedule_table(
        assembly.resolved.steps,
        int(training.warmup_steps),
        float(training.learning_rate),
        training.lr_scheduler,
    )
    model.use_gradient_checkpointing(bool(training.gradient_checkpointing))
    step = TrainStep(
        model,
        parameters,
        optimizer,
        rates,
        max_grad_norm=training.max_grad_norm,
        scaler=scaler,
        dropout_keys=dropout_keys,
    )
    return Trainer(model, parameters, optimizer, scaler, step, step)


def capture(assembly: Assembly, trainer: Trainer, record: RunRecord) -> Trainer:
    """``trainer`` with its step captured as CUDA graphs, where it can be."""
    if assembly.buckets is None:
        return trainer
    training, reads = assembly.recipe.training, trainer.model.host_reads()
    if reads is not None:
        record(Fallback(_NO_GRAPH, reads))
        return trainer
    _choose_products(assembly.buckets, trainer.model)
    try:
        captured = CapturedStep(
            trainer.step,
            assembly.buckets,
            int(training.batch_size),
            int(training.gradient_accumulation),
        )
    except (RuntimeError, torch.AcceleratorError) as error:
        reason = str(error).split("\n")[0]
        record(Fallback(_NO_GRAPH, reason))
        return trainer
    tokens = ", ".join(f"{bucket.tokens:,}" for bucket in assembly.buckets)
    record(
        Choice(
            "buckets",
            None,
            [bucket.tokens for bucket in assembly.buckets],
            f"one CUDA graph of the whole step for batches of up to {tokens} tokens",
        )
    )
    return replace(trainer, take_step=captured)


def _choose_products(buckets: Sequence[Bucket], model: QLoRAModel) -> None:
    """Find the faster library for each product of the buckets' sizes, once on a machine."""
    if model.fused is None:
        return
    folder = Path(os.environ.get(CACHE_VARIABLE, ""))
    known = read_choices(folder)
    chosen = choose_libraries(model.fused, [bucket.tokens for bucket in buckets], known)
    if chosen != known:
        write_choices(folder, chosen)


def _dropout_on_device(model: QLoRAModel, kernels: Kernels) -> Kernel | None:
    """What makes the keys of the dropout masks from now on; None: the host, on a CPU."""
    position = model.position
    if position is None or (model.fused is None and kernels.apply_dropout is None):
        return None
    position.keys = torch.zeros(len(model.lora), 2, dtype=torch.int32, device=model.device)
    position.apply = kernels.apply_dropout
    return kernels.dropout_keys


def _flat_adapter(model: QLoRAModel, parameters: FlatParameters, shadow: Tensor) -> FlatAdapter:
    at = dict(zip(parameters.names, parameters.offsets, strict=True))
    offsets = {
        layer: (at[f"{name}.lora_A"], at[f"{name}.lora_B"]) for name, layer in model.lora.items()
    }
    return FlatAdapter(parameters.data, parameters.grad, shadow, offsets)
