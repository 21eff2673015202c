"""``halfbyte combine`` against PEFT's ``add_weighted_adapter``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapter_case import logits_of, peft_adapter, peft_logits, refusal
from command_line import halfbyte
from family_case import FAMILIES, save_family
from halfbyte.export.combine import combine_layer, low_rank

IDS = torch.randint(3, 290, (40,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and adapters of other ranks, factors and layers."""
    place = tmp_path_factory.mktemp("combine")
    base = save_family(FAMILIES["llama 2"].make, tiny_model, place / "base")
    few = ["q_proj", "v_proj", "down_proj"]
    found = {
        "base": base,
        "a": peft_adapter(base, place / "a", seed=1),
        "b": peft_adapter(
            base,
            place / "b",
            seed=2,
            r=6,
            lora_alpha=7,
            target_modules=few,
            use_rslora=True,
            rank_pattern={"q_proj": 3},
            alpha_pattern={"layers.1.mlp.down_proj": 20},
        ),
    }
    (found["a"] / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    for file in tiny_model.glob("token*"):
        (found["a"] / file.name).write_bytes(file.read_bytes())
    return found


def deltas(folders: dict[str, Path], **adapters: Path) -> Any:
    """PEFT's model with the adapters by their names."""
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    (first, folder), *others = adapters.items()
    model = peft.PeftModel.from_pretrained(base, folder, adapter_name=first)
    for name, folder in others:
        model.load_adapter(folder, adapter_name=name)
    return model


def changes(model: Any, adapter: str) -> dict[str, Tensor]:
    """What an adapter adds to each layer's weight."""
    return {
        name: module.get_delta_weight(adapter).detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and adapter in module.lora_A
    }


METHODS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "linear": ([], {"combination_type": "cat"}),
    "linear, of a lower rank": (["--rank", "5"], {"combination_type": "svd", "svd_rank": 5}),
    "ties": (
        ["--method", "ties", "--density", "0.3"],
        {"combination_type": "ties_svd", "density": 0.3},
    ),
    "ties, of a lower rank": (
        ["--method", "ties", "--rank", "3"],
        {"combination_type": "ties_svd", "density": 0.5, "svd_rank": 3},
    ),
    "dare": (
        ["--method", "dare_linear", "--density", "0.4", "--seed", "9"],
        {"combination_type": "dare_linear_svd", "density": 0.4},
    ),
    "dare with signs": (
        ["--method", "dare_ties", "--density", "0.6", "--seed", "9"],
        {"combination_type": "dare_ties_svd", "density": 0.6},
    ),
}


@pytest.mark.parametrize("case", METHODS)
def test_it_is_what_peft_makes(
    case: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For DARE with the same masks, which PEFT is made to draw as they are drawn here."""
    words, asked = METHODS[case]
    out = tmp_path / "out"
    said = halfbyte(
        *("combine", folders["a"], folders["b"], "--weights", "0.7,-0.4", "--out", out), *words
    ).stdout
    model = deltas(folders, a=folders["a"], b=folders["b"], ours=out)
    layers = list(changes(model, "a"))
    both = set(changes(model, "b"))
    drawn = iter(
        (number, part) for number, name in enumerate(layers) for part in range(1 + (name in both))
    )
    generators = [torch.Generator().manual_seed((9 << 32) + n) for n in range(len(layers))]

    def bernoulli(shares: Tensor) -> Tensor:
        number, _ = next(drawn)
        share = float(shares.view(-1)[0])
        return torch.empty_like(shares).bernoulli_(share, generator=generators[number])

    with monkeypatch.context() as patch:
        if "dare" in case:
            patch.setattr(torch, "bernoulli", bernoulli)
        model.add_weighted_adapter(["a", "b"], [0.7, -0.4], adapter_name="theirs", **asked)
    ours, theirs = changes(model, "ours"), changes(model, "theirs")
    assert ours.keys() == theirs.keys() == set(layers)
    for name in layers:
        assert torch.allclose(ours[name], theirs[name], atol=2e-5 * float(theirs[name].norm()))
    config = json.loads((out / "adapter_config.json").read_text())
    record = json.loads((out / "adapter_origin.json").read_text())
    if case == "linear":
        assert "lost: nothing" in said
        assert record["errors"] is None
        a, b = changes(model, "a"), changes(model, "b")
        for name in layers:
            exact = 0.7 * a[name] - 0.4 * b.get(name, torch.zeros(()))
            assert torch.allclose(ours[name], exact, atol=1e-6)
        assert sorted({config["r"], *config["rank_pattern"].values()}) == [4, 7, 10]
    else:
        assert 0.0 < record["errors"]["mean"] <= record["errors"]["largest"] < 1.0
        assert f"{record['errors']['largest']:.2%} at most" in said
        assert f"{record['errors']['largest']:.2%} at most" in (out / "README.md").read_text()
    assert (out / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"
    assert (out / "tokenizer.json").read_bytes() == (folders["a"] / "tokenizer.json").read_bytes()


def test_the_error_is_that_of_the_matrix_that_was_meant() -> None:
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(90, 60, generator=draw)
    found = low_rank(matrix, 7)
    u, values, vh = torch.linalg.svd(matrix.double())
    best = u[:, :7] * values[:7] @ vh[:7]
    a, b = found.pair
    assert torch.allclose((b @ a).double(), best, atol=1e-4)
    assert found.error == pytest.approx(float((matrix - best).norm() / matrix.norm()), rel=1e-5)


def test_a_large_matrix_is_decomposed_nearly_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 200, generator=draw) * torch.linspace(1, 0.1, 200) ** 2
    exact = low_rank(matrix, 8).error
    monkeypatch.setattr("halfbyte.export.combine._EXACT", 100)
    near = low_rank(matrix, 8).error
    assert exact - 1e-6 <= near <= 1.001 * exact


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_the_expectation(method: Any) -> None:
    """Of one adapter, whose sign is always elected: the mean of many draws is what it does."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 20, generator=draw), torch.randn(30, 3, generator=draw)
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(30, 20)
    draws = 400
    for _ in range(draws):
        one = combine_layer(
            [((a, b), 2.0)], [1.0], method=method, density=0.5, rank=20, generator=generator
        )
        total += one.pair[1] @ one.pair[0]
    expected = 2.0 * b @ a
    # Each draw is off by as much as the number itself, in either direction.
    off = (total / draws - expected) / (expected.abs() / draws**0.5)
    assert 0.9 < float(off.std()) < 1.1
    assert abs(float(off.mean())) < 0.15


def test_what_comes_out_is_an_adapter_to_halfbyte_as_well(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    out, merged = tmp_path / "both", tmp_path / "merged"
    halfbyte("combine", folders["a"], folders["b"], "--out", out)
    words = ("--onto", "original", "--dtype", "fp32", "--device", "cpu")
    halfbyte("merge", out, "--out", merged, *words)
    expected = peft_logits(folders["base"], out, IDS)
    assert float((logits_of(merged, IDS) - expected).abs().max()) < 1e-3 * float(expected.std())


def test_what_cannot_be_combined_is_one_sentence(
    folders: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    a, b, base = folders["a"], folders["b"], folders["base"]
    out = ("--out", tmp_path / "out")
    few = {"target_modules": ["q_proj"]}
    dora = peft_adapter(base, tmp_path / "dora", use_dora=True, **few)
    whole = peft_adapter(base, tmp_path / "whole", modules_to_save=["lm_head"], **few)
    other = peft_adapter(tiny_model, tmp_path / "other", **few)
    for words, says in (
        ((a,), "two adapters or more"),
        ((a, b, "--method", "mean"), "--method mean"),
        ((a, b, "--density", "0.5"), "--density is for ties and dare"),
        ((a, b, "--method", "ties", "--density", "0"), "--density 0"),
        ((a, b, "--weights", "1"), "1 numbers for 2 adapters"),
        ((a, b, "--weights", "1,nan"), "--weights 1,nan"),
        ((a, dora), "dora is a DoRA adapter"),
        ((whole, a), "trained rows of lm_head"),
        ((a, other), "only adapters of one base model"),
        ((a, other, "--base", base), "it is of another base model"),
        ((a, base), "neither a run folder nor an adapter"),
    ):
        assert says in refusal("combine", *words, *out)
    assert "is there already" in refusal("combine", a, b, "--out", tmp_path)
    assert not (tmp_path / "out").exists()
