"""On a GPU: a finished run opened, judged, merged, exported and asked, as on the processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

pytest.importorskip("bitsandbytes")

from adapter_case import apart, in_nf4, logits_of, peft_adapter, peft_logits, train_run
from command_line import halfbyte
from halfbyte.data.batch import TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.export.agreement import compare_logits
from halfbyte.finished import opened as opened_module
from halfbyte.finished.opened import OpenedAdapter, open_adapter
from halfbyte.finished.variants import use_variant

pytestmark = pytest.mark.gpu

IDS = torch.randint(3, 290, (40,), generator=torch.Generator().manual_seed(3))
# Mean KL in nats that bf16 products explain: what `halfbyte merge` grants.
BF16_KL = 2e-2


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on the card in fp32."""
    return train_run(tmp_path_factory.mktemp("gpu") / "run", tiny_model, tiny_rows)


@pytest.fixture(scope="module")
def half_run(tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on the card in bf16, as a run is if nothing else is said."""
    folder = tmp_path_factory.mktemp("gpu") / "half"
    longer = ("training.epochs=4", "training.learning_rate=0.05")
    return train_run(folder, tiny_model, tiny_rows, "precision=bf16", *longer)


@torch.no_grad()
def asked(opened: OpenedAdapter) -> Tensor:
    """Logits [T, vocabulary], fp32 on the CPU."""
    row = TokenizedRow(IDS.numpy().astype(np.int32), np.zeros(len(IDS), dtype=bool), 0)
    return opened.qlora.logits(make_batch([row])).float().cpu()


def read_folder(folder: Path) -> dict[str, Tensor]:
    return {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}


@pytest.mark.parametrize("copies", [False, True])
def test_it_is_opened_as_peft_has_it(run: Path, tiny_model: Path, copies: bool) -> None:
    opened = open_adapter(run, device="cuda", copies=copies)
    assert opened.qlora.device.type == "cuda"
    assert apart(asked(opened), peft_logits(in_nf4(tiny_model), run / "adapter", IDS)) < 1e-4
    with use_variant(opened, "base"):
        base = in_nf4(tiny_model)(input_ids=IDS[None], use_cache=False).logits[0]
        assert apart(asked(opened), base.detach()) < 1e-4


def test_copies_are_kept_where_there_is_room(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept() -> bool:
        layers = open_adapter(run, device="cuda").qlora.linears.values()
        (found,) = {layer.dense is not None for layer in layers}
        return found

    assert kept()
    monkeypatch.setattr(opened_module, "_free_bytes", lambda device: 1000)
    assert not kept()


def test_one_from_elsewhere_is_opened_in_bf16(tiny_model: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(tiny_model, tmp_path / "adapter", use_dora=True)
    opened = open_adapter(adapter, base=str(tiny_model), device="cuda")
    assert opened.qlora.compute_dtype == torch.bfloat16
    expected = peft_logits(in_nf4(tiny_model), adapter, IDS)
    assert compare_logits([asked(opened)], [expected]).kl < BF16_KL


@pytest.mark.parametrize("onto", ["4bit", "original"])
def test_a_merge_is_that_of_the_processor(
    run: Path, tiny_model: Path, tmp_path: Path, onto: str
) -> None:
    for device in ("cuda", "cpu"):
        words = ("--onto", onto, "--dtype", "fp32", "--device", device)
        halfbyte("merge", run, "--out", tmp_path / device, *words)
    ours, theirs = read_folder(tmp_path / "cuda"), read_folder(tmp_path / "cpu")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    base = in_nf4(tiny_model) if onto == "4bit" else tiny_model
    assert apart(logits_of(tmp_path / "cuda", IDS), peft_logits(base, run / "adapter", IDS)) < 1e-4


@pytest.mark.parametrize("onto", ["4bit", "original"])
def test_a_merge_of_a_run_in_bf16_is_within_the_bounds(
    half_run: Path, tiny_model: Path, tmp_path: Path, onto: str
) -> None:
    out = tmp_path / "merged"
    halfbyte("merge", half_run, "--out", out, "--onto", onto, "--device", "cuda")
    measured = json.loads((out / "merge.json").read_text(encoding="utf-8"))
    assert measured["dtype"] == "bf16"
    assert measured["tensors"]["seen"] == measured["tensors"]["adapted"]
    assert measured["with_adapter"]["kl"] < measured["adapter_with_base"]["kl"] / 4
    base = in_nf4(tiny_model) if onto == "4bit" else tiny_model
    expected = peft_logits(base, half_run / "adapter", IDS)
    assert compare_logits([logits_of(out, IDS)], [expected]).kl < BF16_KL


def test_an_export_is_that_of_the_processor(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    for device in ("cuda", "cpu"):
        out = tmp_path / device / "model.gguf"
        halfbyte("export", run, "--type", "f32", "--out", out, "--device", device)
    cuda, cpu = (
        AutoModelForCausalLM.from_pretrained(tmp_path / device, gguf_file="model.gguf")
        for device in ("cuda", "cpu")
    )
    for name, tensor in cpu.state_dict().items():
        torch.testing.assert_close(cuda.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    ours = cuda(input_ids=IDS[None], use_cache=False).logits[0].detach()
    assert apart(ours, peft_logits(in_nf4(tiny_model), run / "adapter", IDS)) < 1e-4


def test_it_is_judged_as_on_the_processor(run: Path, tmp_path: Path) -> None:
    results: dict[str, Any] = {}
    answers = {}
    for device in ("cuda", "cpu"):
        out = tmp_path / device
        halfbyte("evaluate", run, "--max-new-tokens", 8, "--out", out, "--device", device)
        found = json.loads((out / "results.json").read_text(encoding="utf-8"))
        results[device] = {one["key"]: one for one in found["figures"]}
        lines = (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        answers[device] = [json.loads(line) for line in lines]
    for ours, theirs in zip(answers["cuda"], answers["cpu"], strict=True):
        for who in ("base", "adapter"):
            assert ours[who]["loss"] == pytest.approx(theirs[who]["loss"], rel=1e-4)
            assert ours[who]["answer"] == theirs[who]["answer"]
    assert results["cuda"].keys() == results["cpu"].keys()
    for key, ours in results["cuda"].items():
        for who in ("base", "adapter"):
            expected = results["cpu"][key][who]["value"]
            assert ours[who]["value"] == pytest.approx(expected, rel=1e-4, abs=1e-6), key


def test_answers_side_by_side(run: Path, tmp_path: Path) -> None:
    said = {}
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Say the number 3 in words.\n\nOne?\n", encoding="utf-8")
    for device in ("cuda", "cpu"):
        page = tmp_path / f"{device}.html"
        words = ("--prompts", prompts, "--max-new-tokens", 8, "--out", page, "--device", device)
        halfbyte("compare", run, *words)
        found = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
        said[device] = [[answer["text"] for answer in one["answers"]] for one in found["asked"]]
    assert any(any(texts) for texts in said["cpu"])
    assert said["cuda"] == said["cpu"]
