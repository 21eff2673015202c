"""Embedding and head kept in 16 bits give what fp32 copies of them give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.data.batch import Batch, TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.kernels.choice import PLAIN
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.fused import FusedNetwork
from halfbyte.model.load import LoadedBase, load_base
from halfbyte.model.narrow import HostEmbedding, NarrowEmbedding, NarrowHead, embedding_to_host
from halfbyte.model.source import open_model
from halfbyte.recipe.schema import ModelRecipe, QuantizationRecipe
from oracle.case import Family, save_model

IDS = np.arange(3, 60, dtype=np.int32)


def saved(folder: Path, family: Family, tied: bool, dtype: torch.dtype) -> Path:
    save_model(folder, family, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    return folder


def loaded(folder: Path, c: torch.dtype, rest: torch.dtype = torch.float32) -> LoadedBase:
    return load_base(
        open_model(ModelRecipe(name=str(folder))),
        quantization=QuantizationRecipe(),
        device="cpu",
        compute_dtype=c,
        rest_dtype=rest,
    )


def batch() -> Batch:
    return make_batch([TokenizedRow(IDS, np.ones(len(IDS), bool), 0)])


@pytest.mark.parametrize("tied", [False, True], ids=["a head of its own", "tied"])
@pytest.mark.parametrize("c", [torch.bfloat16, torch.float16], ids=str)
def test_the_same_hidden_states_and_logits(
    tmp_path: Path, tied: bool, c: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, "llama", tied, c)
    narrow = loaded(folder, c)
    monkeypatch.setattr("halfbyte.model.load.can_be_narrow", lambda model: {})
    wide = loaded(folder, c)
    ends = narrow.model.get_input_embeddings(), narrow.model.get_output_embeddings()
    assert type(ends[0]) is NarrowEmbedding
    assert type(ends[1]) is NarrowHead
    assert ends[0].weight.dtype == ends[1].weight.dtype == c
    assert (ends[0].weight is ends[1].weight) == tied
    assert wide.model.get_input_embeddings().weight.dtype == torch.float32
    matrix = ends[0].weight.numel()
    assert wide.bytes_other - narrow.bytes_other == (1 if tied else 2) * 2 * matrix

    with torch.no_grad():
        models = [QLoRAModel(m.model, {}, c) for m in (narrow, wide)]
        hidden = [model.hidden(batch()) for model in models]
        assert hidden[0].dtype == torch.float32
        assert torch.equal(*hidden)
        assert torch.equal(*(model.logits(batch()) for model in models))
        assert torch.equal(*(model.loss_sum(batch()) for model in models))
        # As generation uses the head: the product in 16 bits, which rounds hidden state and logit.
        head = wide.model.get_output_embeddings()
        assert head.weight.dtype == torch.float32
        own, expected = ends[1](hidden[0]), head(hidden[0])
        assert own.dtype == torch.float32
        sizes = hidden[0].abs() @ head.weight.abs().t()
        assert ((own - expected).abs() <= torch.finfo(c).eps * sizes).all()


def test_what_is_stored_or_wanted_otherwise_is_not_narrow(tmp_path: Path) -> None:
    fp32 = saved(tmp_path / "fp32", "llama", False, torch.float32)
    assert loaded(fp32, torch.bfloat16).model.get_input_embeddings().weight.dtype == torch.float32
    half = saved(tmp_path / "bf16", "llama", False, torch.bfloat16)
    for c, rest in ((torch.float16, torch.float32), (torch.float32, torch.float32)):
        found = loaded(half, c, rest).model.get_input_embeddings()
        assert type(found) is torch.nn.Embedding
        assert found.weight.dtype == rest
    # Gemma's embedding multiplies what it looks up: a class of its own, left alone.
    gemma = saved(tmp_path / "gemma3", "gemma3", True, torch.bfloat16)
    found = loaded(gemma, torch.bfloat16).model.get_input_embeddings()
    assert not isinstance(found, NarrowEmbedding)
    assert found.weight.dtype == torch.float32


def test_an_embedding_in_main_memory_gives_the_same(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", tied=False, dtype=torch.bfloat16)
    here, there = loaded(folder, torch.bfloat16), loaded(folder, torch.bfloat16)
    assert embedding_to_host(there.model)
    assert type(there.model.get_input_embeddings()) is HostEmbedding
    one, other = (QLoRAModel(m.model, {}, torch.bfloat16) for m in (here, there))
    assert torch.equal(one.hidden(batch()), other.hidden(batch()))
    for model in (one, other):
        model.fused = FusedNetwork(model.network, model.head, torch.bfloat16, PLAIN)
        model.fused.keep_copies()
    with torch.no_grad():
        assert torch.equal(one.loss_sum(batch()), other.loss_sum(batch()))


def test_a_head_that_is_the_embedding_stays(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", tied=True, dtype=torch.bfloat16)
    assert not embedding_to_host(loaded(folder, torch.bfloat16).model)
