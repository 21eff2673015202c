"""New tokens, and embedding and head trained whole, against PEFT's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.errors import ModelError
from halfbyte.events.types import Event, Fallback
from halfbyte.kernels import trained_head
from halfbyte.kernels.trained_head import trained_head_loss
from halfbyte.model.adapter_files import read_adapter
from halfbyte.model.host_reads import HostReads
from halfbyte.model.load import load_base
from halfbyte.model.new_tokens import NewTokens
from halfbyte.model.source import open_model, open_tokenizer
from halfbyte.model.trained_rows import train_rows
from halfbyte.plan.device import Device
from halfbyte.recipe.schema import LoraRecipe, ModelRecipe, QuantizationRecipe
from halfbyte.run.adapter_start import put_saved
from halfbyte.run.record import RunRecord
from halfbyte.run.setup import _fuse
from lora_case import (
    Pass,
    assert_same,
    make_rows,
    our_logits,
    our_model,
    our_pass,
    peft_logits,
    peft_model,
    peft_parameters,
    peft_pass,
    put,
    quantized,
    save,
    save_models,
)
from oracle.case import save_model

NEW = ["<tool>", "</tool>", "ñandú"]
BOTH = ["embed_tokens", "lm_head"]
# Family; modules to save; new tokens.
CASES: dict[str, tuple[str, list[str], list[str]]] = {
    "new tokens": ("llama", [], NEW),
    "new tokens, tied": ("qwen3", [], NEW),
    "new tokens, scaled and tied": ("gemma3", [], NEW),
    "both whole": ("llama", BOTH, []),
    "the head": ("llama", ["lm_head"], []),
    "the embedding, with new tokens": ("llama", ["embed_tokens"], NEW),
    "both whole, with new tokens": ("llama", BOTH, NEW),
    "whole, tied": ("qwen3", ["embed_tokens"], []),
}
SMALL = LoraRecipe(r=4, lora_alpha=8.0, target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory, "llama", "qwen3", "gemma3")


def rows_with(new: NewTokens | None) -> list[TokenizedRow]:
    """Some rows, the new tokens among what they read and what they learn."""
    rows = make_rows(310)
    if new is not None:
        for number, row in enumerate(rows):
            row.input_ids[1::3] = new.first + np.arange(len(row.input_ids[1::3])) % new.count
            row.loss_mask[1::2] = number % 2 == 0
    return rows


def resized(folder: Path, new: NewTokens | None) -> Any:
    """The quantized model as somebody who uses PEFT adds tokens to it."""
    base = quantized(folder)
    if new is not None:
        old = {id(m): m.weight.detach().clone() for m in ends(base)}
        base.resize_token_embeddings(new.rows, mean_resizing=False)
        for before, module in zip(old.values(), ends(base), strict=True):
            rows = slice(new.first, new.first + new.count)
            module.weight.data[rows] = before[: new.first].double().mean(0).float()
    return base


def ends(model: Any) -> list[Any]:
    """Embedding and head; once where they are one."""
    found = [model.get_input_embeddings(), model.get_output_embeddings()]
    return found[:1] if found[0].weight is found[1].weight else found


@pytest.mark.parametrize("case", CASES)
def test_it_is_pefts(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    family, whole, tokens = CASES[case]
    folder = folders[family]
    lora = SMALL.model_copy(update={"modules_to_save": whole})
    ours = our_model(folder, lora, new_tokens=tokens)
    new = open_model(ModelRecipe(name=str(folder), new_tokens=tokens)).new_tokens
    settings: dict[str, Any] = {}
    if new is not None:
        ids = list(range(new.first, new.first + new.count))
        settings["trainable_token_indices"] = {name: ids for name in BOTH if name not in whole}
        if family != "llama":
            settings["trainable_token_indices"].pop("lm_head")
    if whole and family != "llama":
        settings["ensure_weight_tying"] = True
    theirs = peft_model(folder, lora, base=resized(folder, new), **settings)
    expected = peft_parameters(theirs)
    assert ours.lora_parameters().keys() == expected.keys()
    for key, rows in ours.rows.items():
        torch.testing.assert_close(rows.values, expected[key], rtol=1e-6, atol=1e-7)
    batch = rows_with(new)
    for parameters in (ours.lora_parameters(), expected):
        put(parameters)
    ours.adapter_changed()
    found, wanted = our_pass(ours, batch), peft_pass(theirs, batch)
    assert_same(only_met(found, batch), only_met(wanted, batch))
    for key, gradient in wanted.gradients.items():
        torch.testing.assert_close(found.gradients[key], gradient, rtol=1e-3, atol=1e-4)

    save(ours, tmp_path, lora, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        logits = peft_logits(tmp_path, resized(folder, new), batch)
    got = our_logits(ours, batch)
    assert (got - logits).abs().max() <= 2e-5 * logits.abs().max()
    again = our_model(folder, lora, new_tokens=tokens)
    put_saved(again, read_adapter(tmp_path))
    assert torch.equal(our_logits(again, batch), got)
    if ours.rows:
        save(our_model(folder, SMALL), tmp_path, SMALL, folder)
        with pytest.raises(ModelError, match="does not hold the trained rows"):
            put_saved(again, read_adapter(tmp_path))


def only_met(found: Pass, rows: list[TokenizedRow]) -> Pass:
    """Without the rows of whole embeddings that no row has: their gradient is zero."""
    met = sorted({int(i) for row in rows for i in row.input_ids})
    return Pass(
        found.loss,
        {
            n: g[met] if n.endswith("embed_tokens.modules_to_save") else g
            for n, g in found.gradients.items()
        },
    )


def test_switched_off_all_is_as_it_was(folders: dict[str, Path]) -> None:
    lora = SMALL.model_copy(update={"modules_to_save": ["embed_tokens"]})
    model = our_model(folders["llama"], lora, new_tokens=NEW)
    batch = rows_with(None)
    with model.adapter_on(False):
        before = our_logits(model, batch)
    put(model.lora_parameters())
    model.adapter_changed()
    trained = our_logits(model, batch)
    assert not torch.equal(trained, before)
    with model.adapter_on(False):
        assert torch.equal(our_logits(model, batch), before)
    assert torch.equal(our_logits(model, batch), trained)


def test_new_rows_are_the_mean_and_spare_rows_are_used_first(tmp_path: Path) -> None:
    folder = tmp_path
    save_model(folder, "llama", vocab_size=324)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    weight = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    spare = len(weight) - len(tokenizer)
    assert spare == 4
    for tokens in (NEW[:1], [*NEW, *(f"<extra {i}>" for i in range(spare))]):
        source = open_model(ModelRecipe(name=str(folder), new_tokens=tokens))
        new = source.new_tokens
        assert new is not None
        assert new.rows == max(len(weight), len(tokenizer) + len(tokens))
        assert source.config.vocab_size == new.rows
        ids = source.tokenizer.convert_tokens_to_ids(tokens)
        assert ids == list(range(len(tokenizer), len(tokenizer) + len(tokens)))
        text = f"a {tokens[0]} b"
        assert ids[0] in source.tokenizer(text)["input_ids"]
        read = source.read("model.embed_tokens.weight")
        assert torch.equal(read[: len(tokenizer)], weight[: len(tokenizer)])
        mean = weight[: len(tokenizer)].double().mean(0).float()
        for i in ids:
            torch.testing.assert_close(read[i], mean, rtol=1e-6, atol=1e-8)
        assert source.read("model.norm.weight").shape == weight.shape[1:]
    with pytest.raises(ModelError, match="has already as token 1"):
        open_model(ModelRecipe(name=str(folder), new_tokens=["<s>"]))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("whole", [False, True])
def test_the_head_loss_is_autograds(
    softcap: float | None, scale: float, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained_head, "CHUNK_BYTES", 4 * 50 * 7)  # seven positions at once
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=generator).requires_grad_()
    weight = torch.randn(50, 16, generator=generator)
    first, count = (0, 50) if whole else (45, 3)
    rows = nn.Parameter(weight[first : first + count].clone())
    labels = torch.randint(0, 50, (40,), generator=generator)
    labels[::5] = -100
    loss = trained_head_loss(
        hidden, weight, rows, labels, first=first, scale=scale, softcap=softcap
    )
    (loss * 0.37).backward()
    h = hidden.detach().double().requires_grad_()
    w = weight.double().requires_grad_()
    z = h @ w.t() * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    expected = cross_entropy(z, labels, ignore_index=-100, reduction="sum")
    (expected * 0.37).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    near = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(hidden.grad.double(), h.grad, **near)
    torch.testing.assert_close(rows.grad.double(), w.grad[first : first + count], **near)


def test_kept_in_16_bits_what_is_trained_is_in_32(folders: dict[str, Path], tmp_path: Path) -> None:
    """A step too small for the kept type adds up all the same."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.bfloat16)
    base.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folders["llama"]).save_pretrained(tmp_path)
    source = open_model(ModelRecipe(name=str(tmp_path), new_tokens=NEW))
    loaded = load_base(
        source,
        quantization=QuantizationRecipe(),
        device="cpu",
        compute_dtype=torch.bfloat16,
        rest_dtype=torch.float32,
    )
    rows = next(iter(train_rows(loaded.model, source.new_tokens, []).values()))
    assert rows.weight.dtype == torch.bfloat16
    before = rows.values.detach().clone()
    for _ in range(100):
        with torch.no_grad():
            rows.values.mul_(1.0001)
        rows.write()
    kept: Tensor = rows.weight[rows.first : rows.first + len(rows.values)]
    assert torch.equal(kept, (before * 1.0001**100).bfloat16())
    assert not torch.equal(kept, before.bfloat16())


def test_nothing_is_read_by_the_host(folders: dict[str, Path]) -> None:
    model = our_model(folders["qwen3"], SMALL, new_tokens=NEW)
    batch = make_batch(make_rows(310), 5, tokens=96, labels=64, max_seqlen=32)
    out = model.network.get_input_embeddings()(batch.input_ids)
    hidden = torch.randn(len(batch.labels), 64, requires_grad=True)
    rows = next(iter(model.rows.values()))
    with HostReads() as reads:
        loss = trained_head_loss(
            hidden, model.head.weight, rows.values, batch.labels, first=rows.first
        )
        (loss + out.sum()).backward()
    assert reads.found == []


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {}])
def test_it_is_said_that_layers_are_not_fused(
    settings: dict[str, Any], folders: dict[str, Path]
) -> None:
    lora = SMALL.model_copy(update=settings)
    model = our_model(folders["llama"], lora, new_tokens=None if settings else NEW)
    heard: list[Event] = []
    h100 = Device("cuda", "H100", 85 * 10**9, 80 * 10**9, (9, 0), True, 16)
    _fuse(model, h100, RunRecord([heard.append]), None, None)
    assert model.fused is None
    reasons = [event.reason for event in heard if isinstance(event, Fallback)]
    assert "lora.modules_to_save, model.new_tokens" in reasons[0]


def test_who_asks_for_the_tokenizer_alone_gets_the_new_tokens_too(folders: dict[str, Path]) -> None:
    recipe = ModelRecipe(name=str(folders["llama"]), new_tokens=["<tool>", "<end>"])
    source, (tokenizer, config) = open_model(recipe), open_tokenizer(recipe)
    text = "a <tool> of <end>"
    assert tokenizer(text)["input_ids"] == source.tokenizer(text)["input_ids"]
    assert (
        config.vocab_size
        == source.config.vocab_size
        == tokenizer.convert_tokens_to_ids("<end>") + 1
    )
