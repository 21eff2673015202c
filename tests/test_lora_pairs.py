"""Every two settings of an adapter's training, together in a whole run.

Each setting is tested by itself elsewhere; here each value of one meets each value of every other
in some run, which learns, goes on after an interruption to the same bits, and whose adapter PEFT
loads with the same logits and gradients.
"""

from __future__ import annotations

import json
import os
import signal
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

from halfbyte import Recipe, Run, train
from halfbyte.events import read_events
from halfbyte.events.types import Checked, Event, Fallback, Step
from halfbyte.finished import open_adapter
from lora_case import (
    assert_same,
    logits_of,
    make_rows,
    our_logits,
    our_pass,
    peft_pass,
    peft_saved,
    quantized,
    save_models,
    with_its_start,
)

Value = dict[str, dict[str, Any]]  # section of a recipe: settings
FACTORS: dict[str, dict[str, Value]] = {
    "model": {"llama": {}, "qwen3": {}},
    "start": {
        "kaiming": {},
        "pissa": {"lora": {"init": "pissa"}},
        "loftq": {"lora": {"init": "loftq"}},
    },
    "targets": {
        "all": {},
        "ranks": {
            "lora": {
                "target_modules": r".*\.(q_proj|v_proj|down_proj)",
                "rank_pattern": {r"0\.mlp\.down_proj": 6},
                "alpha_pattern": {"v_proj": 12},
            }
        },
        "names": {
            "lora": {"target_modules": ["o_proj", "up_proj"], "exclude_modules": ["1.mlp.up_proj"]}
        },
    },
    "tokens": {
        "none": {},
        "new": {"model": {"new_tokens": ["number", " and"]}},
        "whole": {"lora": {"modules_to_save": ["embed_tokens"]}},
    },
    "optimizer": {
        "adamw": {"training": {"optimizer": "adamw", "weight_decay": 0.1}},
        "8bit": {"training": {"optimizer": "adamw_8bit"}},
        "paged": {"training": {"optimizer": "paged_adamw_8bit"}},
    },
    "kind": {"lora": {}, "dora": {"lora": {"use_dora": True}}},
    "factor": {"1/r": {}, "rslora": {"lora": {"use_rslora": True}}},
    "rates": {"one": {}, "loraplus": {"training": {"loraplus_lr_ratio": 4}}},
    "dropout": {"0": {}, "0.2": {"lora": {"lora_dropout": 0.2}}},
    "rows": {"apart": {}, "packed": {"data": {"packing": True}}},
    "layers": {
        "kept": {"training": {"gradient_checkpointing": False}},
        "recomputed": {"training": {"gradient_checkpointing": True}},
    },
    "sources": {"one": {}, "two": {}},
    "micro-batches": {"1": {}, "2": {"training": {"gradient_accumulation": 2, "batch_size": 2}}},
}
Chosen = dict[str, str]  # factor: name of its value


def covering(factors: dict[str, list[str]]) -> list[Chosen]:
    """Few choices in which every two values of two factors meet: each the best of some tries."""
    random = Random(2)
    missing = {
        ((f, a), (g, b))
        for f, g in combinations(factors, 2)
        for a in factors[f]
        for b in factors[g]
    }
    found = []
    while missing:
        tries = [_greedy(factors, missing, random) for _ in range(60)]
        found.append(max(tries, key=lambda chosen: len(missing & _pairs(chosen, factors))))
        missing -= _pairs(found[-1], factors)
    return found


def _greedy(factors: dict[str, list[str]], missing: set[Any], random: Random) -> Chosen:
    """A value of one factor after the other, each the one with most of the ``missing`` pairs."""
    chosen: Chosen = {}
    for factor in random.sample(list(factors), len(factors)):
        met = {
            value: len(missing & _pairs({**chosen, factor: value}, factors))
            for value in random.sample(factors[factor], len(factors[factor]))
        }
        chosen[factor] = max(met, key=lambda value: met[value])
    return {factor: chosen[factor] for factor in factors}


def _pairs(chosen: Chosen, factors: dict[str, list[str]]) -> set[Any]:
    there = [(name, chosen[name]) for name in factors if name in chosen]
    return set(combinations(there, 2))


NAMES = {factor: list(values) for factor, values in FACTORS.items()}
RUNS = covering(NAMES)
IDS = [", ".join(f"{v}" for v in chosen.values()) for chosen in RUNS]


def test_every_two_values_meet() -> None:
    met = {frozenset(pair) for chosen in RUNS for pair in combinations(chosen.items(), 2)}
    values = [(factor, value) for factor in NAMES for value in NAMES[factor]]
    assert met == {frozenset((a, b)) for a, b in combinations(values, 2) if a[0] != b[0]}
    assert len(RUNS) <= 14


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    head_dim = 64 if torch.cuda.is_available() else 16  # what kernels take
    return save_models(tmp_path_factory, "llama", "qwen3", head_dim=head_dim)


@pytest.fixture(scope="module")
def second_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some rows of another format than those of ``tiny_rows``."""
    path = tmp_path_factory.mktemp("second") / "rows.json"
    rows = [
        {"prompt": f"And the number {n}?", "completion": "It is one and " * (n % 4) + f"{n}."}
        for n in range(12)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def recipe_of(chosen: Chosen, device: str, model: Path, first: Path, second: Path) -> Recipe:
    values: dict[str, Any] = {
        "model": {"name": str(model)},
        "data": {"path": str(first), "held_out": 4, "max_length": 200, "template": "alpaca"},
        "precision": "fp32" if device == "cpu" else "bf16",
        "device": device,
        "lora": {"r": 4, "lora_alpha": 8},
        "training": {
            "batch_size": 4,
            "gradient_accumulation": 1,
            "max_steps": 3,
            "learning_rate": 5e-3,
            "warmup_steps": 0,
            "lr_scheduler": "constant",
        },
        "evaluation": {"every_steps": 3, "prompts": 0, "base_loss": False, "keep": "last"},
        "checkpoints": {"every_steps": 2},
    }
    if chosen["sources"] == "two":
        del values["data"]["path"]
        values["data"]["sources"] = [{"path": str(first), "weight": 2}, {"path": str(second)}]
    for factor, name in chosen.items():
        for section, settings in FACTORS[factor][name].items():
            values[section] = values[section] | settings
    return Recipe.model_validate(values)


def events(run: Run) -> list[Event]:
    return [record.event for record in read_events(run.folder)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("chosen", RUNS, ids=IDS)
def test_a_run(
    chosen: Chosen,
    device: str,
    folders: dict[str, Path],
    tiny_rows: Path,
    second_source: Path,
    tmp_path: Path,
) -> None:
    model = folders[chosen["model"]]
    asked = recipe_of(chosen, device, model, tiny_rows, second_source)
    if device == "cuda" and chosen["start"] != "kaiming":
        # cuSOLVER's decompositions were other ones, in the last bits, in a process's first run.
        train(asked, out=tmp_path / "first", runs=tmp_path)
    whole = train(asked, out=tmp_path / "whole", runs=tmp_path)
    told = events(whole)
    assert all(event.passed for event in told if isinstance(event, Checked))
    assert device == "cuda" or not [event for event in told if isinstance(event, Fallback)]
    losses = [event.loss for event in told if isinstance(event, Step)]
    assert len(losses) == 3

    def interrupt(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    part = train(asked, out=tmp_path / "part", runs=tmp_path, listeners=[interrupt])
    assert part.interrupted
    resumed = train(resume=part.folder, runs=tmp_path)
    assert resumed.losses() == whole.losses()
    saved = load_file(whole.adapter / "adapter_model.safetensors")
    again = load_file(resumed.adapter / "adapter_model.safetensors")
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())

    rows = make_rows()
    qlora = open_adapter(whole.folder).qlora
    base = with_its_start(qlora, model) if chosen["start"] == "pissa" else quantized(model)
    if chosen["tokens"] == "new":
        vocabulary = qlora.head.weight.shape[0]
        base.resize_token_embeddings(vocabulary, mean_resizing=False)
        rows[0].input_ids[2::5] = vocabulary - 1
        rows[2].input_ids[::7] = vocabulary - 2
    theirs = peft_saved(whole.adapter, base)
    ours, expected = our_logits(qlora, rows), logits_of(theirs, rows)
    apart = (ours.cpu() - expected).abs().max() / expected.abs().max()
    if device == "cuda":  # bf16 against fp32
        assert apart <= 0.05
        return
    assert apart <= 1e-4

    # Going on from there, both would change it alike.
    found, wanted = our_pass(qlora, rows, training=False), peft_pass(theirs, rows)
    if chosen["start"] == "pissa":  # of twice the rank, the other half of which is not trained
        ranks = {name: layer.lora_A.shape[0] for name, layer in qlora.lora.items()}
        for name, rank in ranks.items():
            for key, kept in (("lora_A", slice(rank)), ("lora_B", (slice(None), slice(rank)))):
                gradient = wanted.gradients[f"{name}.{key}"]
                wanted.gradients[f"{name}.{key}"] = gradient[kept]
    assert_same(found, wanted, sparse=("modules_to_save", "trainable_tokens_delta"))
