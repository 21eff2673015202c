"""The model, its adapter and its optimizer, ready for step 1."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.files import ADAPTER
from halfbyte.data.batch import Batch, Bucket
from halfbyte.engine.capture import CapturedStep
from halfbyte.engine.products import (
    choose_libraries,
    product_name,
    read_choices,
    write_choices,
)
from halfbyte.engine.result import StepResult
from halfbyte.engine.scaler import LossScaler
from halfbyte.engine.step import TrainStep
from halfbyte.events.types import Choice, Fallback, ModelLoaded, Warned
from halfbyte.kernels.cache import VARIABLE as CACHE_VARIABLE
from halfbyte.kernels.choice import PLAIN, Kernel, Kernels, choose_kernels
from halfbyte.kernels.trial.processes import Trial
from halfbyte.model.causal import QLoRAModel, attention_dropout
from halfbyte.model.experts import mistaken_for_experts
from halfbyte.model.fusable import TRAINED_ENDS
from halfbyte.model.fused import FusedNetwork, NotFusedError
from halfbyte.model.load import load_base
from halfbyte.model.lora import attach_lora
from halfbyte.model.narrow import embedding_to_host
from halfbyte.model.source import ModelSource
from halfbyte.model.trained_rows import train_rows
from halfbyte.model.varlen import NoKernelError
from halfbyte.optim.choose import make_optimizer
from halfbyte.optim.flat import FlatParameters, flatten_parameters
from halfbyte.optim.loraplus import rate_factors
from halfbyte.optim.schedule import schedule_table
from halfbyte.plan.device import Device
from halfbyte.quant.joined import FlatAdapter
from halfbyte.recipe import Recipe
from halfbyte.run.adapter_start import low_rank_start
from halfbyte.run.assembly import Assembly
from halfbyte.run.kernel_trial import passed
from halfbyte.run.precision import DTYPES
from halfbyte.run.record import RunRecord
from halfbyte.run.strategy import Strategy, kernel_names, kernels_named, versions_here

_NO_GRAPH = "each step launched kernel by kernel, in place of a CUDA graph"
_WHY_CAPTURED = (
    "the whole step is one CUDA graph for each bucket, launched as one and not kernel by kernel"
)
_WHY_BUCKETS = (
    "a batch is padded to the first of these numbers of tokens that holds it, so that shapes repeat"
)


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

    @property
    def captured(self) -> bool:
        return isinstance(self.take_step, CapturedStep)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, by name; views, not copies."""
        return {
            **{f"{ADAPTER}{n}": p.detach() for n, p in self.model.lora_parameters().items()},
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
        return {n: t.clone() for n, t in self.state().items() if n.startswith(ADAPTER)}

    @torch.no_grad()
    def load_adapter(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.model.lora_parameters().items():
            parameter.copy_(state[f"{ADAPTER}{name}"])
        self.model.adapter_changed()


def load_model(
    recipe: Recipe,
    source: ModelSource,
    device: Device,
    *,
    copied_layers: int | None = None,
    embedding_on_host: bool = False,
    record: RunRecord | None = None,
    earlier: Strategy | None = None,
    trial: Trial | None = None,
    begun: Path | None = None,
) -> tuple[QLoRAModel, ModelLoaded]:
    """Quantize the base as it is read and attach a fresh adapter.

    ``recipe`` is effective. The linear layers of the first ``copied_layers`` (by default of all)
    also keep their weights dequantized; ``embedding_on_host`` keeps the embedding in main memory,
    if it is not the head as well. With a ``record`` the model is to be trained: on a GPU its
    layers are fused if they can be, and the record hears how that was decided; ``earlier`` says
    with which kernels the run began, and ``trial`` which of them work here. ``begun`` is the folder
    of the run if its adapter has been trained already and is put in next: how it started is then
    read and not made again.
    """
    compute_dtype = DTYPES[str(recipe.precision)]
    rest_dtype = torch.float32 if recipe.quantization.upcast_rest else compute_dtype
    start = low_rank_start(recipe, source, begun)
    loaded = load_base(
        source,
        quantization=recipe.quantization,
        device=device.kind,
        compute_dtype=compute_dtype,
        rest_dtype=rest_dtype,
        hook=start,
        progress=None if record is None else record.progress("quantize", "matrices"),
    )
    if embedding_on_host:
        embedding_to_host(loaded.model)
    if device.kind == "cuda":
        # What quantizing took and left; the steps have their memory elsewhere.
        torch.cuda.empty_cache()
    lora = attach_lora(
        loaded.model,
        r=recipe.lora.r,
        lora_alpha=float(recipe.lora.lora_alpha),
        lora_dropout=float(recipe.lora.lora_dropout),
        target_modules=recipe.lora.target_modules,
        exclude_modules=recipe.lora.exclude_modules,
        rank_pattern=recipe.lora.rank_pattern,
        alpha_pattern=recipe.lora.alpha_pattern,
        use_rslora=recipe.lora.use_rslora,
        use_dora=recipe.lora.use_dora,
        init=recipe.lora.init,
        start=None if start is None else start.pairs,
        seed=recipe.seed,
    )
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    rows = train_rows(loaded.model, source.new_tokens, recipe.lora.modules_to_save)
    model = QLoRAModel(loaded.model, lora, compute_dtype, rows)
    for parameter in model.lora_parameters().values():
        parameter.requires_grad_(True)
    if record is not None:
        _tell_of_dropout(source, record)
        _tell_of_experts(model, record)
    if record is not None and device.kind == "cuda":
        _fuse(model, device, record, earlier, trial)
    copied = 0
    if model.fused is not None:
        copied = model.fused.keep_copies(copied_layers)
        model.fused.use_scratch()
        torch.cuda.empty_cache()  # codes were moved end to end
    elif copied_layers != 0:
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


def _tell_of_dropout(source: ModelSource, record: RunRecord) -> None:
    share = attention_dropout(source.config)
    if share > 0.0:
        record(
            Warned(
                f"the configuration of {source.name} drops {share:.0%} of attention's "
                "probabilities in training, which halfbyte's attention does not; set "
                "lora.lora_dropout if the adapter learns its rows by heart"
            )
        )


def _tell_of_experts(model: QLoRAModel, record: RunRecord) -> None:
    names = mistaken_for_experts(model.network, model.lora)
    if names:
        leaves = ", ".join(names)
        record(
            Warned(
                f"beside its experts the model has layers named {leaves}, which get adapters; PEFT "
                "takes these names for the experts' in most such models and then leaves these "
                f"adapters out; --set lora.exclude_modules='[{leaves}]' if PEFT is to load it"
            )
        )


def _kernels(device: Device, earlier: Strategy | None) -> tuple[Kernels, str]:
    """The kernels and what they are in words; those that the run began with, if it goes on."""
    kernels, words = choose_kernels(device.capability)
    before = None if earlier is None else kernels_named(earlier.kernels)
    return before or kernels, words


def _fuse(
    model: QLoRAModel,
    device: Device,
    record: RunRecord,
    earlier: Strategy | None,
    trial: Trial | None,
) -> None:
    """Give ``model`` fused layers, or at least kernels for its own; say why where not."""
    kernels, words = _kernels(device, earlier)
    kernels = passed(trial, kernels, record)
    try:
        if model.rows:
            raise NotFusedError(TRAINED_ENDS)
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
    trained = model.lora_parameters()
    parameters = flatten_parameters(
        trained,
        rates=rate_factors(trained, training),
        # As transformers' Trainer has it: an embedding's state, most of it seldom met, is in fp32.
        full_state=[key for key, rows in model.rows.items() if rows.whole and rows.in_embedding],
    )
    kernels, _ = _kernels(assembly.device, assembly.earlier)
    kernels = model.kernels or kernels
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
    model.use_gradient_checkpointing(assembly.resolved.recomputed_layers > 0)
    if model.fused is not None:
        model.fused.recompute_layers(assembly.resolved.recomputed_layers)
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
    sizes = [bucket.tokens for bucket in assembly.buckets]
    record(Choice("buckets", None, sizes, _WHY_BUCKETS))
    training, reads = assembly.recipe.training, trainer.model.host_reads()
    earlier = assembly.earlier
    if reads is None and earlier is not None and not earlier.captured:
        reads = "as when the run began"
    if reads is not None:
        record(Fallback(_NO_GRAPH, reads))
        return trainer
    _choose_products(assembly.buckets, trainer.model, earlier.products if earlier else {})
    try:
        captured = CapturedStep(
            trainer.step,
            assembly.buckets,
            assembly.batches.capacity,
            int(training.gradient_accumulation),
        )
    except (RuntimeError, torch.AcceleratorError) as error:
        reason = str(error).split("\n")[0]
        record(Fallback(_NO_GRAPH, reason))
        return trainer
    record(Choice("captured", None, True, _WHY_CAPTURED))
    return replace(trainer, take_step=captured)


def strategy(assembly: Assembly, trainer: Trainer) -> Strategy:
    """How the steps of this run are made."""
    fused, device = trainer.model.fused, assembly.device
    kernels = trainer.model.kernels if fused is None else fused.kernels
    joined = [] if fused is None else fused.joined
    return Strategy(
        device=device.name,
        versions=versions_here(),
        recomputed_layers=assembly.resolved.recomputed_layers,
        copied_layers=assembly.resolved.copied_layers,
        kernels=kernel_names(kernels or _kernels(device, assembly.earlier)[0]),
        products={
            product_name(one, tokens, backward): library
            for one in joined
            for (tokens, backward), library in one.libraries.items()
        },
        buckets=assembly.buckets,
        captured=trainer.captured,
        deterministic=assembly.recipe.training.deterministic,
    )


def _choose_products(buckets: Sequence[Bucket], model: QLoRAModel, earlier: dict[str, str]) -> None:
    """Find the faster library for each product of the buckets' sizes, once on a machine.

    ``earlier`` are those that the run began with.
    """
    if model.fused is None:
        return
    folder = Path(os.environ.get(CACHE_VARIABLE, ""))
    known = read_choices(folder)
    tokens = [bucket.tokens for bucket in buckets]
    chosen = choose_libraries(model.fused, tokens, {**known, **earlier})
    found = {name: library for name, library in chosen.items() if name not in earlier}
    if not found.items() <= known.items():
        write_choices(folder, found)


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
