"""What is decided where the recipe says nothing, and what is said of what it states."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Trainer, TrainingArguments

from halfbyte.errors import ModelError
from halfbyte.events.types import Choice, Warned
from halfbyte.plan import defaults
from halfbyte.plan.device import Device
from halfbyte.plan.explain import explain
from halfbyte.plan.resolve import Resolved, resolve
from halfbyte.recipe import Recipe
from halfbyte.recipe.load import parse_recipe
from halfbyte.recipe.schema import LoraRecipe
from halfbyte.recipe.settings import get, settings
from halfbyte.recipe.write import dump_recipe

GB = 1_000_000_000
CPU = Device("cpu", "some CPU", 24 * GB, 20 * GB, None, False, 2)
CPU_BF16 = Device("cpu", "newer CPU", 24 * GB, 20 * GB, None, True, 8)
T4 = Device("cuda", "Tesla T4", 15_600_000_000, 15_300_000_000, (7, 5), False, 2)
P100 = Device("cuda", "Tesla P100", 16 * GB, 16 * GB, (6, 0), False, 2)
DESKTOP = Device("cuda", "RTX 4090", 25 * GB, 24 * GB, (8, 9), True, 16)
H100 = Device("cuda", "NVIDIA H100", 85 * GB, 84 * GB, (9, 0), True, 16)

TINY = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocab: int) -> Any:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


LLAMA_8B = llama(4096, 14336, 32, 32, 8, 128256)
LLAMA_2_13B = llama(5120, 13824, 40, 40, 40, 32000)


def recipe_of(text: str = "") -> Recipe:
    return parse_recipe("model: {name: m}\ndata: {path: d}\n" + text, "r.yaml")


def resolved(
    text: str = "",
    *,
    device: Device = CPU,
    config: Any = TINY,
    rows: int = 300,
    max_length: int = 128,
    held_out: int = 15,
) -> Resolved:
    found = resolve(
        recipe_of(text),
        device=device,
        model_config=config,
        rows=rows,
        max_length=max_length,
        held_out=held_out,
        template="chat",
        formats=["instruction"],
    )
    # Nothing is left open but what is decided at the end, and a second resolving changes nothing,
    # also after a way over the disk: a run goes on from its own recipe.
    left = [key for key in settings() if get(found.recipe, key) == "auto"]
    assert left == ["report.loss_at_steps"]
    again = resolve(
        parse_recipe(dump_recipe(found.recipe), "r.yaml"),
        device=device,
        model_config=config,
        rows=rows,
        max_length=max_length,
        held_out=held_out,
    )
    assert again.recipe == found.recipe
    assert again.steps == found.steps
    if not 0 < found.recomputed_layers < config.num_hidden_layers:
        assert again.recomputed_layers == found.recomputed_layers
        assert again.copied_layers == found.copied_layers
    told = {choice.key for choice in again.choices}
    short = {"training.optimizer"} if "paged" in found.recipe.training.optimizer else set()
    assert told <= {"copies", "embedding", "training.max_steps", "report.loss_at_steps", *short}
    for choice in found.choices:
        assert choice.reason
        assert choice.reason[-1] != "."
        if choice.key in settings():
            assert get(found.recipe, choice.key) == choice.value
    return found


def test_the_defaults() -> None:
    found = resolved()
    recipe = found.recipe
    assert recipe.lora == LoraRecipe(r=16, lora_alpha=32)
    assert recipe.lora.target_modules == "all-linear"
    assert recipe.training.learning_rate == 2e-4
    assert recipe.training.lr_scheduler == "cosine"
    assert recipe.training.max_grad_norm == 1.0
    assert recipe.training.weight_decay == 0.0
    assert int(recipe.training.batch_size) * int(recipe.training.gradient_accumulation) == 16
    assert recipe.training.epochs == 3
    assert found.steps == 3 * math.ceil(300 / 16)
    assert recipe.quantization.double_quant is True
    assert recipe.data.loss_on == "answer"
    assert (recipe.data.held_out, recipe.data.max_length) == (15, 128)
    assert recipe.data.template == "chat"
    assert recipe.evaluation.keep == "best"
    assert recipe.checkpoints.every_steps == recipe.evaluation.every_steps
    assert recipe.checkpoints.keep_last == 2
    reasons = {choice.key for choice in found.choices}
    assert {
        *("lora.r", "lora.lora_alpha", "lora.lora_dropout", "lora.target_modules", "precision"),
        *("training.learning_rate", "training.lr_scheduler", "training.warmup_steps", "device"),
        *("training.max_grad_norm", "training.weight_decay", "training.batch_size", "copies"),
        *("training.gradient_accumulation", "training.epochs", "training.gradient_checkpointing"),
        *("training.optimizer", "quantization.type", "quantization.double_quant"),
        *("quantization.upcast_rest", "data.loss_on", "evaluation.every_steps"),
        *("evaluation.keep", "checkpoints.every_steps"),
    } <= reasons
    assert found.warnings == []


def test_what_is_stated_is_kept_and_no_reason_is_made_up_for_it() -> None:
    text = (
        "lora: {r: 8, lora_alpha: 12.5, lora_dropout: 0.1, target_modules: [q_proj]}\n"
        "training: {learning_rate: 1e-4, batch_size: 3, gradient_accumulation: 5, epochs: 1.5,\n"
        "  warmup_steps: 2, gradient_checkpointing: true, optimizer: adamw}\n"
        "evaluation: {every_steps: 7, keep: last}\ncheckpoints: {every_steps: 9}\n"
        "quantization: {upcast_rest: false}\nprecision: fp32\ndevice: cpu\n"
    )
    found = resolved(text)
    asked = recipe_of(text)
    for key in settings():
        if get(asked, key) != "auto":
            assert get(found.recipe, key) == get(asked, key)
    assert found.steps == 30  # 1.5 · ⌈300 / 15⌉
    told = {choice.key for choice in found.choices}
    assert not told & {"lora.r", "training.epochs", "training.optimizer", "precision", "device"}


@pytest.mark.parametrize(
    ("rows", "epochs"),
    [(1, 3), (1_999, 3), (2_000, 2), (19_999, 2), (20_000, 1), (5_000_000, 1)],
)
def test_epochs_by_rows(rows: int, epochs: int) -> None:
    found = resolved(rows=rows)
    assert found.recipe.training.epochs == epochs
    assert found.steps == epochs * math.ceil(rows / 16)


def test_learning_rate_by_parameters() -> None:
    assert defaults.learning_rate(12_999_999_999)[0] == 2e-4
    assert defaults.learning_rate(13_000_000_000)[0] == 1e-4
    assert resolved(config=LLAMA_2_13B, device=H100).recipe.training.learning_rate == 1e-4
    assert resolved(config=LLAMA_8B, device=H100).recipe.training.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("steps", "warmup"),
    [(1, 0), (6, 3), (9, 4), (10, 5), (166, 5), (167, 6), (375, 12), (1000, 30), (1001, 31)],
)
def test_warmup_is_3_percent_and_at_least_5_steps(steps: int, warmup: int) -> None:
    assert defaults.warmup_steps(steps)[0] == warmup


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 57, 375, 99_999])
def test_about_ten_evaluations_and_none_without_rows(steps: int) -> None:
    every = defaults.evaluation_every(steps, 20)[0]
    times = math.ceil(steps / every)  # the last step is measured in any case
    assert min(steps, 6) <= times <= 10
    assert defaults.evaluation_every(steps, 0)[0] == 0
    assert defaults.checkpoint_every(steps, every)[0] == every
    assert defaults.checkpoint_every(steps, 0)[0] >= 1


def test_without_held_out_rows_the_last_adapter_is_kept() -> None:
    found = resolved(held_out=0)
    assert found.recipe.evaluation.keep == "last"
    assert found.recipe.evaluation.every_steps == 0
    assert found.recipe.checkpoints.every_steps == 6
    assert resolved("evaluation: {every_steps: 0}\n").recipe.evaluation.keep == "last"
    stated = resolved("evaluation: {keep: best}\n", held_out=0)
    assert any("evaluation.keep is best, but" in text for text in stated.warnings)


def test_early_stopping_without_held_out_rows_is_warned_of() -> None:
    early = "evaluation: {early_stopping: {patience: 3}}\n"
    warned = [resolved(early, held_out=n).warnings for n in (0, 4)]
    assert [any("early_stopping.patience is 3, but" in w for w in found) for found in warned] == [
        True,
        False,
    ]


def trainer_steps(tmp_path: Path, rows: int, batch: int, accumulation: int, epochs: float) -> int:
    trainer = Trainer(
        model=torch.nn.Linear(1, 1),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=epochs,
            use_cpu=True,
            report_to=[],
        ),
        train_dataset=torch.utils.data.TensorDataset(torch.zeros(rows, 1)),
    )
    return int(
        trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    )


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs"),
    [
        (500, 4, 1, 3),
        (501, 4, 1, 3),
        (501, 4, 3, 2),
        (7, 8, 1, 3),
        (101, 4, 4, 0.3),
        (90, 8, 2, 2.5),
    ],
)
def test_steps_are_counted_as_by_transformers_trainer(
    rows: int, batch: int, accumulation: int, epochs: float, tmp_path: Path
) -> None:
    text = (
        f"training:\n  batch_size: {batch}\n  gradient_accumulation: {accumulation}\n"
        f"  epochs: {epochs}\n"
    )
    expected = trainer_steps(tmp_path, rows, batch, accumulation, epochs)
    assert resolved(text, rows=rows).steps == expected


def test_fractions_of_an_epoch_are_not_rounded_by_floating_point() -> None:
    assert 0.07 * 100 > 7  # which is why the product is made exactly
    assert defaults.steps(100, 0.07) == 7
    assert defaults.steps(10, 0.01) == 1


def test_max_steps_ends_the_run_whatever_epochs_says() -> None:
    few = resolved("training: {max_steps: 3}\n")
    assert few.steps == 3
    assert few.recipe.training.epochs == 3
    assert few.recipe.training.warmup_steps == 1
    (choice,) = [c for c in few.choices if c.key == "training.max_steps"]
    assert "where training.epochs alone would make 57 steps" in choice.reason
    assert resolved("training: {max_steps: 1000, epochs: 1}\n").steps == 1000


@pytest.mark.parametrize(
    ("text", "batch", "accumulation"),
    [
        ("training: {batch_size: 4}\n", 4, 4),
        ("training: {batch_size: 5}\n", 5, 3),
        ("training: {batch_size: 64}\n", 64, 1),
        ("training: {gradient_accumulation: 8}\n", 2, 8),
        ("training: {gradient_accumulation: 50}\n", 1, 50),
    ],
)
def test_what_is_open_makes_about_16_rows_a_step(text: str, batch: int, accumulation: int) -> None:
    training = resolved(text).recipe.training
    assert (training.batch_size, training.gradient_accumulation) == (batch, accumulation)


@pytest.mark.parametrize(
    ("device", "precision", "reason"),
    [
        (CPU, "fp32", "100 times slower"),
        (CPU_BF16, "bf16", "natively"),
        (T4, "fp16", "loss scaling"),
        (P100, "fp32", "no matrix units"),
        (DESKTOP, "bf16", "natively"),
        (H100, "bf16", "natively"),
    ],
    ids=lambda value: value.name if isinstance(value, Device) else value,
)
def test_precision_by_device(device: Device, precision: str, reason: str) -> None:
    found = resolved(device=device)
    assert found.recipe.precision == precision
    assert found.recipe.device == device.kind
    (choice,) = [c for c in found.choices if c.key == "precision"]
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("stated", "device", "better"),
    [
        ("bf16", T4, "fp16"),
        ("bf16", CPU, "fp32"),
        ("fp16", CPU, "fp32"),
        ("fp16", CPU_BF16, "bf16"),
        ("fp32", H100, "bf16"),
        ("fp16", H100, "bf16"),
        ("fp16", P100, "fp32"),
        ("bf16", H100, None),
        ("fp16", T4, None),
        ("fp32", CPU, None),
        ("fp32", CPU_BF16, None),
    ],
)
def test_a_stated_precision_is_kept_with_a_warning_where_it_is_slow(
    stated: str, device: Device, better: str | None
) -> None:
    found = resolved(f"precision: {stated}\n", device=device)
    assert found.recipe.precision == stated
    if better is None:
        assert found.warnings == []
    else:
        (warning,) = found.warnings
        assert f"--set precision=auto, which is {better} here." in warning


def test_memory_decides_recomputing_batch_and_copy() -> None:
    length = 2048
    on_t4 = resolved(config=LLAMA_8B, device=T4, max_length=length)
    assert on_t4.recipe.training.gradient_checkpointing is True
    assert on_t4.copied_layers < 32  # 14 GB for all
    on_h100 = resolved(config=LLAMA_8B, device=H100, max_length=length)
    assert on_h100.recipe.training.gradient_checkpointing is False
    assert int(on_h100.recipe.training.batch_size) >= int(on_t4.recipe.training.batch_size)
    small = resolved(device=T4)
    assert small.recipe.training.gradient_checkpointing is False
    assert small.copied_layers == TINY.num_hidden_layers
    stated = resolved(
        "training: {gradient_checkpointing: false, batch_size: 16}\n",
        config=LLAMA_8B,
        device=T4,
        max_length=length,
    )
    assert stated.recipe.training.gradient_checkpointing is False
    (warning,) = stated.warnings
    assert "may run out of memory; try --set training.gradient_checkpointing=true" in warning
    assert "--set training.batch_size=4 --set training.gradient_accumulation=4" in warning


def test_norms_stay_in_fp32_unless_memory_is_too_short_for_it() -> None:
    assert resolved(device=T4).recipe.quantization.upcast_rest is True
    tight = Device("cuda", "small GPU", 8_600_000_000, 8_500_000_000, (8, 6), True, 8)
    found = resolved(config=LLAMA_8B, device=tight, max_length=512)
    assert found.recipe.quantization.upcast_rest is False
    (choice,) = [c for c in found.choices if c.key == "quantization.upcast_rest"]
    assert "would not fit into 8.6 GB of the GPU's memory" in choice.reason


def test_other_programs_that_hold_most_of_the_memory_are_reckoned_with() -> None:
    busy = Device("cuda", "busy GPU", 85 * GB, 16 * GB, (9, 0), True, 16)
    found = resolved(config=LLAMA_8B, device=busy, max_length=2048)
    assert found.recipe.training.gradient_checkpointing is True
    (choice,) = [c for c in found.choices if c.key == "training.gradient_checkpointing"]
    assert "16.0 GB free now" in choice.reason


@pytest.mark.parametrize(
    ("device", "config", "reason"),
    [
        (CPU, TINY, "a CPU has no second memory to page to"),
        (T4, TINY, "the largest trained matrix has 2,048 elements"),
        (H100, LLAMA_8B, "small enough to stay on the GPU"),
    ],
)
def test_paging_is_never_dropped_silently(device: Device, config: Any, reason: str) -> None:
    for text in ("", "training: {optimizer: paged_adamw_8bit}\n"):
        found = resolved(text, device=device, config=config)
        (choice,) = [c for c in found.choices if c.key == "training.optimizer"]
        assert (choice.asked, choice.value) == ("paged_adamw_8bit", "adamw_8bit")
        assert reason in choice.reason


def test_state_is_paged_where_a_step_does_not_fit_with_it() -> None:
    text = "training: {optimizer: paged_adamw_8bit}\nmemory_limit_gb: 6\n"
    found = resolved(text, device=H100, config=LLAMA_8B)
    assert found.recipe.training.optimizer == "paged_adamw_8bit"
    (choice,) = [c for c in found.choices if c.key == "training.optimizer"]
    assert "main memory" in choice.reason


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training: {learning_rate: 0.0051}\n", "training.learning_rate is 0.0051; above 0.005"),
        ("training: {warmup_steps: 57}\n", "and the run has 57 steps, so the learning rate never"),
        ("training: {batch_size: 512}\n", "a step takes 512 rows and there are 300: an epoch is"),
        ("training: {epochs: 11}\n", "training.epochs is 11; rows seen more than 10 times"),
        ("lora: {r: 33}\n", "lora.r is 33, more than the rank"),
    ],
)
def test_what_is_stated_and_unwise_is_done_with_a_warning(text: str, said: str) -> None:
    found = resolved(text)
    assert [said in warning for warning in found.warnings] == [True]
    key = text.split(":")[0] + "." + text.split("{")[1].split(":")[0]
    assert get(found.recipe, key) == get(recipe_of(text), key)


def test_nothing_is_warned_of_at_the_border() -> None:
    text = "training: {learning_rate: 0.005, warmup_steps: 56, epochs: 3}\n"
    assert resolved(text).warnings == []


def test_a_large_model_stands_a_lower_rate() -> None:
    def warned(rate: str) -> bool:
        text = f"training: {{learning_rate: {rate}}}\n"
        warnings = resolved(text, config=LLAMA_8B, device=H100).warnings
        return any("above 0.001" in warning for warning in warnings)

    assert warned("0.0011")
    assert not warned("0.001")


def test_a_target_that_the_model_lacks_is_named() -> None:
    with pytest.raises(
        ModelError, match=r"'c_attn', which this model does not have; it has q_proj"
    ):
        resolved("lora: {target_modules: [c_attn]}\n")


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 10_000_000),
    batch=st.integers(1, 64),
    accumulation=st.integers(1, 16),
    epochs=st.floats(0.01, 20),
)
def test_steps_cover_the_rows_once_an_epoch(
    rows: int, batch: int, accumulation: int, epochs: float
) -> None:
    per_epoch = defaults.steps_per_epoch(rows, batch * accumulation)
    assert (per_epoch - 1) * batch * accumulation < rows <= per_epoch * batch * accumulation
    total = defaults.steps(per_epoch, epochs)
    assert total >= 1
    assert total - 1 < epochs * per_epoch * (1 + 1e-12)
    assert total >= epochs * per_epoch * (1 - 1e-12)
    warmup = defaults.warmup_steps(total)[0]
    assert 0 <= warmup < total


def test_a_recipe_is_explained_before_anything_is_read() -> None:
    asked = recipe_of("training: {epochs: 2}\n")
    effective, events = explain(asked, T4)
    said = {event.key: event for event in events if isinstance(event, Choice)}
    assert (effective.precision, effective.device, effective.lora.lora_alpha) == (
        "fp16",
        "cuda",
        32,
    )
    for key in settings():
        if get(effective, key) == "auto":
            assert said[key].value == "auto"
    assert "decided when the rows are known" in said["data.max_length"].reason
    assert "decided when the model and the rows are known" in said["training.batch_size"].reason
    assert "training.epochs" not in said
    assert asked == recipe_of("training: {epochs: 2}\n")  # and is not changed by it
    assert explain(asked)[0].device in ("cpu", "cuda")
    assert not [event for event in events if isinstance(event, Warned)]
    _, events = explain(recipe_of("precision: bf16\n"), T4)
    (warning,) = [event for event in events if isinstance(event, Warned)]
    assert "--set precision=auto, which is fp16 here." in warning.text
