"""Whole runs with adapters of other kinds: saved, read again, gone on with, asked, and in PEFT.

More than two settings at once, and longer runs than those of ``test_lora_pairs.py``.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

from halfbyte import Recipe, Run, train
from halfbyte.events import read_events
from halfbyte.events.types import Checked, Event, ModelLoaded, Step
from halfbyte.finished import open_adapter
from lora_case import make_rows, our_logits, peft_logits, quantized, save_models, with_its_start

CASES: dict[str, dict[str, Any]] = {
    "PiSSA, DoRA, rsLoRA, ranks": {
        "lora": {
            "init": "pissa_niter_16",
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"v_proj": 8},
        }
    },
    "embedding whole, new tokens": {
        "model": {"new_tokens": ["number"]},
        "lora": {"modules_to_save": ["embed_tokens"], "use_dora": True},
    },
    "ranks, rsLoRA": {
        "lora": {
            "rank_pattern": {"down_proj": 8, r"0\.self_attn\..*": 2},
            "alpha_pattern": {"v_proj": 32},
            "exclude_modules": ["1.mlp.up_proj"],
            "use_rslora": True,
        }
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory, "llama")["llama"]


def recipe(case: str, model: Path, rows: Path) -> Recipe:
    values: dict[str, Any] = {
        "model": {"name": str(model)},
        "data": {"path": str(rows), "held_out": 4, "max_length": 200},
        "precision": "fp32",
        "device": "cpu",
        "lora": {"r": 4, "lora_alpha": 8},
        "training": {
            "batch_size": 4,
            "gradient_accumulation": 1,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
        },
        "evaluation": {"every_steps": 2, "prompts": 1, "max_new_tokens": 4, "base_loss": False},
        "checkpoints": {"every_steps": 2},
    }
    for section, settings in CASES[case].items():
        values[section] = values[section] | settings
    return Recipe.model_validate(values)


def events(run: Run) -> list[Event]:
    return [record.event for record in read_events(run.folder)]


@pytest.mark.parametrize("case", CASES)
def test_a_run(case: str, model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    asked = recipe(case, model, tiny_rows)
    whole = train(asked, out=tmp_path / "whole", runs=tmp_path)
    losses = whole.losses()
    assert losses[-1][1] < losses[0][1]
    told = events(whole)
    assert all(event.passed for event in told if isinstance(event, Checked))
    saved = load_file(whole.adapter / "adapter_model.safetensors")
    counted = next(e.parameters_trainable for e in told if isinstance(e, ModelLoaded))
    pissa = case.startswith("PiSSA")  # whose start stands in the file too
    assert counted == sum(
        tensor.numel() // (2 if pissa and "magnitude" not in name else 1)
        for name, tensor in saved.items()
    )

    # An interrupted run goes on to the same bits.
    def interrupt(event: Event) -> None:
        if isinstance(event, Step) and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    part = train(asked, out=tmp_path / "part", runs=tmp_path, listeners=[interrupt])
    assert part.interrupted
    resumed = train(resume=part.folder, runs=tmp_path)
    assert resumed.losses() == losses
    again = load_file(resumed.adapter / "adapter_model.safetensors")
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())

    # What is asked is what was trained, and what PEFT has.
    rows = make_rows()
    qlora = open_adapter(whole.folder).qlora
    ours = our_logits(qlora, rows)
    base = with_its_start(qlora, model) if pissa else quantized(model)
    base.resize_token_embeddings(qlora.head.weight.shape[0], mean_resizing=False)
    theirs = peft_logits(whole.adapter, base, rows)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
