"""The model, its adapter and its optimizer, ready for step 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.engine.scaler import LossScaler
from halfbyte.engine.step import TrainStep
from halfbyte.events.types import ModelLoaded
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.load import load_base
from halfbyte.model.lora import attach_lora
from halfbyte.model.source import ModelSource
from halfbyte.optim.choose import make_optimizer
from halfbyte.optim.flat import FlatParameters, flatten_parameters
from halfbyte.optim.schedule import schedule_table
from halfbyte.recipe import Recipe
from halfbyte.run.assembly import Assembly

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Trainer:
    """All that training changes, and the step that changes it."""

    model: QLoRAModel
    parameters: FlatParameters
    optimizer: Any
    scaler: LossScaler
    step: TrainStep

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


def load_model(
    recipe: Recipe, source: ModelSource, device: str, *, keep_copy: bool
) -> tuple[QLoRAModel, ModelLoaded]:
    """Quantize the base as it is read and attach a fresh adapter.

    ``recipe`` is effective. With ``keep_copy`` every linear layer also keeps its weight
    dequantized.
    """
    compute_dtype = DTYPES[str(recipe.precision)]
    rest_dtype = torch.float32 if recipe.quantization.upcast_rest else compute_dtype
    loaded = load_base(
        source,
        quantization=recipe.quantization,
        device=device,
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
    copied = sum(layer.keep_dense() for layer in model.linears.values()) if keep_copy else 0
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


def make_trainer(assembly: Assembly, model: QLoRAModel) -> Trainer:
    """The optimizer, the schedule and the step of a run at its beginning."""
    recipe, training = assembly.recipe, assembly.recipe.training
    parameters = flatten_parameters(model.lora_parameters())
    optimizer = make_optimizer(training.optimizer, parameters, training)
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
    )
    return Trainer(model, parameters, optimizer, scaler, step)
