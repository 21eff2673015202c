"""An adapter of any kind twice: PEFT's on bitsandbytes' layers, and ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from halfbyte.data.batch import Batch, TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.model.adapter_files import save_adapter
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.load import load_base
from halfbyte.model.lora import attach_lora
from halfbyte.model.source import open_model
from halfbyte.model.trained_rows import train_rows
from halfbyte.recipe.schema import LoraRecipe, ModelRecipe, QuantizationRecipe
from halfbyte.run.adapter_start import saved_adapter
from oracle.case import Family, save_model

PREFIX = "base_model.model."


def save_models(make: pytest.TempPathFactory, *families: Family, **changed: Any) -> dict[str, Path]:
    """Folders of a random model of each family, with settings ``changed``."""
    found = {family: make.mktemp(family) for family in families}
    for family, folder in found.items():
        save_model(folder, family, **changed)
    return dict(found)


def quantized(folder: Path) -> Any:
    """transformers' model of ``folder`` in 4 bits, all else in fp32."""
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )


def peft_model(folder: Path, lora: LoraRecipe, base: Any = None, **changed: Any) -> Any:
    """PEFT's model with a fresh adapter of these settings, which have PEFT's names."""
    import peft

    settings = lora.model_dump(exclude={"init"}) | {"task_type": "CAUSAL_LM"} | changed
    settings["modules_to_save"] = settings["modules_to_save"] or None
    base = quantized(folder) if base is None else base
    return peft.get_peft_model(base, peft.LoraConfig(**settings)).train()


def our_model(
    folder: Path, lora: LoraRecipe, seed: int = 3, new_tokens: list[str] | None = None
) -> QLoRAModel:
    """Ours with a fresh adapter, in fp32 but for what is in NF4."""
    new_tokens = new_tokens or []
    source = open_model(ModelRecipe(name=str(folder), new_tokens=new_tokens))
    loaded = load_base(
        source,
        quantization=QuantizationRecipe(),
        device="cpu",
        compute_dtype=torch.float32,
        rest_dtype=torch.float32,
    )
    layers = attach_lora(loaded.model, seed=seed, **settings_of(lora))
    rows = train_rows(loaded.model, source.new_tokens, lora.modules_to_save)
    return QLoRAModel(loaded.model, layers, torch.float32, rows)


def settings_of(lora: LoraRecipe) -> dict[str, Any]:
    """What :func:`attach_lora` takes of it."""
    return lora.model_dump(exclude={"modules_to_save"})


def peft_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """PEFT's trained parameters under our names."""
    return {
        name.removeprefix(PREFIX)
        .removesuffix(".weight")
        .removesuffix(".default")
        .replace(".token_adapter", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def put(parameters: dict[str, torch.nn.Parameter], seed: int = 5) -> None:
    """A and B at random, neither zero, and all else moved a little, the same for every model."""
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(parameters):
        parameter = parameters[name]
        drawn = torch.randn(parameter.shape, generator=generator)
        if name.endswith("lora_A"):
            parameter.copy_(drawn * parameter.shape[1] ** -0.5)
        elif name.endswith("lora_B"):
            parameter.copy_(drawn * 0.02)
        else:
            parameter.mul_(1.0 + 0.1 * drawn)


def make_rows(vocabulary: int = 320) -> list[TokenizedRow]:
    random = np.random.default_rng(0)
    return [
        TokenizedRow(random.integers(3, vocabulary, n).astype(np.int32), random.random(n) < 0.6, i)
        for i, n in enumerate((17, 5, 30, 9))
    ]


@dataclass
class Pass:
    """The loss summed over all labels, and its gradients."""

    loss: float
    gradients: dict[str, Tensor]


def our_pass(model: QLoRAModel, rows: list[TokenizedRow], training: bool = True) -> Pass:
    parameters = model.lora_parameters()
    model.network.train(training)
    loss = model.loss_and_gradients(make_batch(rows), torch.ones(()))
    return Pass(loss.item(), {n: p.grad.clone() for n, p in parameters.items()})


def peft_pass(model: Any, rows: list[TokenizedRow]) -> Pass:
    """Each row alone, as PEFT's own model runs it."""
    total = torch.zeros(())
    for row in rows:
        ids = torch.from_numpy(row.input_ids).long()
        labels = torch.where(torch.from_numpy(row.loss_mask), ids, -100)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total = total + cross_entropy(logits.float(), labels[1:], reduction="sum")
    total.backward()
    gradients = {n: p.grad for n, p in peft_parameters(model).items()}
    return Pass(total.item(), gradients)


def assert_same(ours: Pass, theirs: Pass, sparse: tuple[str, ...] = ()) -> None:
    """Loss to five digits, each gradient's direction and length.

    Gradients whose names end with one of ``sparse`` may be zero in most places.
    """
    assert abs(ours.loss / theirs.loss - 1.0) < 1e-5
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, expected in theirs.gradients.items():
        a, b = ours.gradients[name].double().view(-1), expected.double().view(-1)
        least = 0 if name.endswith(sparse) else len(b) // 4
        assert b.count_nonzero() > least, f"most of the gradient of {name} is zero"
        assert (a @ b / (a.norm() * b.norm())).item() > 0.9999, name
        assert abs((a.norm() / b.norm()).item() - 1.0) < 1e-3, name


def save(model: QLoRAModel, folder: Path, lora: LoraRecipe, base: Path) -> None:
    """The adapter as a run leaves it."""
    layers, settings = saved_adapter(lora, model)
    save_adapter(folder, layers, base_name=str(base), **settings)


def peft_saved(folder: Path, base: Any) -> Any:
    """``base`` with the saved adapter as PEFT loads it, ready to be trained but for dropout."""
    import peft

    return peft.PeftModel.from_pretrained(base, folder, is_trainable=True).eval()


@torch.no_grad()
def logits_of(model: Any, rows: list[TokenizedRow]) -> Tensor:
    """Each row alone, as the model itself runs it."""
    ids = [torch.from_numpy(row.input_ids).long()[None] for row in rows]
    return torch.cat([model(input_ids=i, use_cache=False).logits[0] for i in ids])


def peft_logits(folder: Path, base: Any, rows: list[TokenizedRow]) -> Tensor:
    """Logits of ``base`` with the saved adapter as PEFT loads it."""
    return logits_of(peft_saved(folder, base), rows)


@torch.no_grad()
def our_logits(model: QLoRAModel, rows: list[TokenizedRow]) -> Tensor:
    model.network.eval()
    return model.logits(_batch(rows))


def _batch(rows: list[TokenizedRow]) -> Batch:
    return make_batch(rows)


def with_its_start(qlora: QLoRAModel, folder: Path) -> Any:
    """The base model as PiSSA's run has it: what was frozen, in 4 bits, and what was taken out."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, layer in qlora.linears.items():
        weight = layer.base.dequantize(torch.float32)
        if layer.initial is not None:
            a, b = layer.initial
            weight = weight + layer.scale * b @ a
        base.get_submodule(name).weight = torch.nn.Parameter(weight.cpu())
    return base
