"""Networks that drop something by themselves in training, beside what their adapters drop."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Phi3Config, Phi3ForCausalLM

from family_case import save_family
from halfbyte import Recipe, Run, train
from halfbyte.events import read_events
from halfbyte.events.types import Event, Step, Warned


@pytest.fixture(scope="module")
def folder_of(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A Phi 3 with these settings; its weights are the same whatever they are."""

    def folder(**settings: float) -> Path:
        def make() -> Any:
            torch.manual_seed(5)
            return Phi3ForCausalLM(
                Phi3Config(
                    vocab_size=300,
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    max_position_embeddings=256,
                    original_max_position_embeddings=256,
                    pad_token_id=0,
                    **settings,
                )
            )

        return save_family(make, tiny_model, tmp_path_factory.mktemp("phi"))

    return folder


def recipe(model: Path, rows: Path, device: str = "cpu", **training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": str(model)},
            "data": {"path": str(rows), "held_out": 0, "max_length": 200},
            "precision": "fp32" if device == "cpu" else "bf16",
            "device": device,
            "lora": {"r": 4},
            "training": {
                "batch_size": 2,
                "gradient_accumulation": 2,
                "max_steps": 4,
                "learning_rate": 1e-2,
                "warmup_steps": 0,
            }
            | training,
            "evaluation": {"prompts": 0, "base_loss": False},
            "checkpoints": {"every_steps": 2},
        }
    )


def adapter(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def assert_equal(one: Run, other: Run) -> None:
    assert one.losses() == other.losses()
    ours, theirs = adapter(one), adapter(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_seed_makes_one_training_and_a_run_goes_on_the_same(
    device: str, folder_of: Callable[..., Path], tiny_rows: Path, tmp_path: Path
) -> None:
    model = folder_of(resid_pdrop=0.2)
    kept = recipe(model, tiny_rows, device, gradient_checkpointing=False)
    torch.manual_seed(1)
    whole = train(kept, out=tmp_path / "whole", runs=tmp_path)
    torch.manual_seed(2)
    assert_equal(whole, train(kept, out=tmp_path / "again", runs=tmp_path))
    again = recipe(model, tiny_rows, device, gradient_checkpointing=True)
    recomputed = train(again, out=tmp_path / "recomputed", runs=tmp_path)
    if device == "cpu":  # on a GPU one of the two may be a graph, whose masks are others
        assert_equal(whole, recomputed)

    def interrupt(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    part = train(kept, out=tmp_path / "part", runs=tmp_path, listeners=[interrupt])
    assert part.interrupted
    torch.manual_seed(3)
    assert_equal(whole, train(resume=part.folder, runs=tmp_path))

    nothing = train(recipe(folder_of(), tiny_rows, device), out=tmp_path / "nothing", runs=tmp_path)
    assert all(a[1] != b[1] for a, b in zip(whole.losses(), nothing.losses(), strict=True))
    other = kept.model_copy(update={"seed": 7, "lora": kept.lora})
    assert train(other, out=tmp_path / "other", runs=tmp_path).losses() != whole.losses()


@pytest.mark.parametrize(("share", "told"), [(0.0, False), (0.1, True)])
def test_attentions_own_dropout_is_left_out_and_that_is_said(
    share: float, told: bool, folder_of: Callable[..., Path], tiny_rows: Path, tmp_path: Path
) -> None:
    model = folder_of(attention_dropout=share)
    run = train(recipe(model, tiny_rows, max_steps=1), out=tmp_path / "run", runs=tmp_path)
    warned = [r.event.text for r in read_events(run.folder) if isinstance(r.event, Warned)]
    assert any("drops 10% of attention's probabilities" in text for text in warned) == told
