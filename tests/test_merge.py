"""``halfbyte merge``: what it writes is the adapter's model, whoever loads it, or it is nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

pytest.importorskip("bitsandbytes")

from bitsandbytes import functional

from adapter_case import apart, in_nf4, logits_of, peft_adapter, peft_logits, refusal, train_run
from command_line import halfbyte
from family_case import FAMILIES, bitsandbytes_folder, save_family
from halfbyte.export import merged_weights
from halfbyte.export.merged_folder import MergedFolder
from halfbyte.export.merged_weights import MergedWeights
from halfbyte.model.safetensors_files import SafetensorsFiles

NEW = [f"<say {number}>" for number in range(40)]  # more than the base has rows to spare
IDS = torch.randint(3, 290, (40,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(tmp_path_factory.mktemp("merge") / "run", tiny_model, tiny_rows)


@pytest.fixture(scope="module")
def grown_run(tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With PiSSA, and tokens that the base does not have."""
    folder = tmp_path_factory.mktemp("merge") / "grown"
    new = f"model.new_tokens={NEW}"
    return train_run(folder, tiny_model, tiny_rows, new, "lora.init=pissa", "lora.r=4")


@pytest.fixture(scope="module")
def faint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that does little more to the outputs than rounding to bf16 does."""
    base = save_family(FAMILIES["llama 2"].make, tiny_model, tmp_path_factory.mktemp("faint"))
    return peft_adapter(base, tmp_path_factory.mktemp("merge") / "faint", lora_alpha=0.5)


def test_a_run_becomes_the_model_that_was_trained(
    run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    said = halfbyte("merge", run, "--out", out, "--dtype", "fp32", "--device", "cpu").stdout
    expected = peft_logits(in_nf4(tiny_model), run / "adapter", IDS)
    assert apart(logits_of(out, IDS), expected) < 1e-4
    original = peft_logits(tiny_model, run / "adapter", IDS)
    assert apart(expected, original) > 0.05, "rounding does nothing, so that the test sees nothing"
    assert "rounded to 4 bits" in said
    assert "5 rows of rows.jsonl" in said

    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (out, run / "adapter"))
    assert ours.chat_template == theirs.chat_template
    assert ours("Say 3 in words.").input_ids == theirs("Say 3 in words.").input_ids
    assert GenerationConfig.from_pretrained(out).eos_token_id == ours.eos_token_id
    record = json.loads((out / "merge.json").read_text())
    assert record["onto"] == "4bit"
    assert record["with_adapter"]["top1"] == 1.0
    assert record["tensors"]["seen"] == record["tensors"]["adapted"] == 14
    card = (out / "README.md").read_text()
    assert "base_model" in card or "merged into its weights" in card
    assert str(tmp_path) not in card
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


def test_onto_the_original_weights_it_says_how_far_it_is_from_the_trained_model(
    run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "merged"
    words = ("--onto", "original", "--dtype", "fp16", "--device", "cpu")
    said = halfbyte("merge", run, "--out", out, *words).stdout
    assert "merged, 4-bit model" in said
    assert apart(logits_of(out, IDS), peft_logits(tiny_model, run / "adapter", IDS)) < 0.02
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.float16
    record = json.loads((out / "merge.json").read_text())
    assert record["with_4bit_model"]["kl"] > 10 * record["with_adapter"]["kl"]


@pytest.mark.parametrize("onto", ["4bit", "original"])
def test_new_tokens_and_a_start_taken_out_of_the_weights(
    onto: str, grown_run: Path, tmp_path: Path
) -> None:
    """Agreement with the run's own model is asked of every merge, so that this one has it."""
    out = tmp_path / "merged"
    halfbyte("merge", grown_run, "--out", out, "--onto", onto, "--dtype", "fp32", "--device", "cpu")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    last = tokenizer.convert_tokens_to_ids(NEW[-1])
    assert len(model.get_input_embeddings().weight) == model.config.vocab_size == last + 1 > 300
    assert tokenizer.decode([last]) == NEW[-1]
    assert json.loads((out / "merge.json").read_text())["with_adapter"]["kl"] < 1e-9


@pytest.mark.parametrize("family", ["llama 2", "qwen 3", "gemma 3", "granite", "qwen 3 moe"])
def test_it_is_loaded_as_the_base_is(family: str, tiny_model: Path, tmp_path: Path) -> None:
    """Under the base's names, experts apart as there, and with PEFT's logits."""
    base = save_family(FAMILIES[family].make, tiny_model, tmp_path / "base")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapter = peft_adapter(
        base, tmp_path / "adapter", target_modules=targets, use_dora=family == "granite"
    )
    out = tmp_path / "out"
    words = ("--onto", "original", "--dtype", "fp32", "--shard-size", "60kB", "--device", "cpu")
    halfbyte("merge", adapter, "--out", out, *words)
    files = SafetensorsFiles.of_folder(out)
    theirs = SafetensorsFiles.of_folder(base)
    assert sorted(files.names()) == sorted(theirs.names())
    assert len(files.files()) > 3
    for name in theirs.names():
        assert files.read(name).shape == theirs.read(name).shape
    assert apart(logits_of(out, IDS), peft_logits(base, adapter, IDS)) < 1e-4
    config = json.loads((out / "config.json").read_text())
    kept = json.loads((base / "config.json").read_text())
    assert {k: config[k] for k in kept if k in config and "dtype" not in k} == {
        k: v for k, v in kept.items() if k in config and "dtype" not in k
    }
    index = json.loads((out / "model.safetensors.index.json").read_text())
    total = 0
    for file in files.files():
        assert file.stat().st_size < 200_000
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                total += opened.get_tensor(name).nbytes
                assert index["weight_map"][name] == file.name
    assert total == index["metadata"]["total_size"]


def test_a_base_that_is_in_4_bits_already(tiny_model: Path, tmp_path: Path) -> None:
    """As bitsandbytes stored it, and with nothing left that says so."""
    original = save_family(FAMILIES["llama 2"].make, tiny_model, tmp_path / "original")
    base = bitsandbytes_folder(original, tmp_path / "base")
    adapter = peft_adapter(original, tmp_path / "adapter")
    out = tmp_path / "out"
    words = ("merge", adapter, "--base", base, "--out", out, "--dtype", "fp32", "--device", "cpu")
    assert "in 4 bits only" in refusal(*words, "--onto", "original")
    halfbyte(*words)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    stored = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    for name, parameter in stored.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:  # bitsandbytes would round to the type that it was made from
            state.dtype = torch.float32
            parameter = functional.dequantize_4bit(parameter.data, state)
        theirs.get_parameter(name).data.copy_(parameter)
    assert apart(logits_of(out, IDS), peft_logits(theirs, adapter, IDS)) < 1e-4


Broken = Callable[[pytest.MonkeyPatch], None]


def _wrapped(patch: pytest.MonkeyPatch, what: str, change: Callable[[str, Tensor], Tensor]) -> None:
    real = getattr(MergedWeights, what)

    def changed(self: MergedWeights, name: str, *more: Any) -> Tensor:
        return change(name, real(self, name, *more))

    patch.setattr(MergedWeights, what, changed)


def wrong_scale(patch: pytest.MonkeyPatch) -> None:
    real = merged_weights.saved_scales
    patch.setattr(
        merged_weights, "saved_scales", lambda s: {n: 1.3 * v for n, v in real(s).items()}
    )


def missing_layer(patch: pytest.MonkeyPatch) -> None:
    real = MergedWeights._require_magnitudes

    def without(self: MergedWeights) -> None:
        real(self)
        self._layers = {n: p for n, p in self._layers.items() if n != "model.layers.1.mlp.up_proj"}

    patch.setattr(MergedWeights, "_require_magnitudes", without)


def transposed(patch: pytest.MonkeyPatch) -> None:
    square = "model.layers.0.self_attn.o_proj.weight"
    _wrapped(patch, "_matrix", lambda name, w: w.t() if name == square else w)


def other_norm(patch: pytest.MonkeyPatch) -> None:
    _wrapped(patch, "read", lambda name, w: w * 1.01 if name == "model.norm.weight" else w)


def shifted_embedding(patch: pytest.MonkeyPatch) -> None:
    _wrapped(patch, "read", lambda name, w: w.roll(1, 0) if "embed_tokens" in name else w)


def other_positions(patch: pytest.MonkeyPatch) -> None:
    real = MergedFolder._config

    def changed(self: MergedFolder) -> dict[str, Any]:
        config = real(self)
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 50.0}
        return config

    patch.setattr(MergedFolder, "_config", changed)


SABOTAGE: dict[str, tuple[Broken, str]] = {
    "a wrong scale": (wrong_scale, "1.30 is there in place of 1"),
    "a missing layer": (
        missing_layer,
        "does at model.layers.1.mlp.up_proj, 0.0",
    ),
    "a transposed matrix": (transposed, "layers.0.self_attn.o_proj is off"),
    "a norm that is a hundredth off": (other_norm, "model.norm.weight has other numbers"),
    "an embedding out of place": (shifted_embedding, "embed_tokens.weight has other numbers"),
    "other rotary frequencies": (other_positions, "nats from the adapter's"),
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_a_merge_that_disagrees_is_not_kept(
    what: str, faint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16, whose rounding moves the logits nearly as much as this adapter does."""
    breaks, says = SABOTAGE[what]
    breaks(monkeypatch)
    out = tmp_path / "on the way" / "merged"
    said = refusal("merge", faint, "--out", out, "--device", "cpu")
    assert "the merged model is not the adapter's" in said
    assert says in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("onto", ["4bit", "original"])
def test_a_weak_adapter_is_seen_whole_where_products_are_in_bf16(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, onto: str, use_dora: bool
) -> None:
    """Outputs rounded to bf16 would hide it: 5 of the 14 layers could then be judged."""
    base = save_family(FAMILIES["qwen 2.5"].make, tiny_model, tmp_path / "base")  # with biases
    weak = peft_adapter(base, tmp_path / "weak", lora_alpha=0.5, use_dora=use_dora)
    monkeypatch.setattr("halfbyte.finished.opened.choose_precision", lambda _: ("bf16", ""))
    out = tmp_path / "merged"
    halfbyte("merge", weak, "--out", out, "--onto", onto, "--dtype", "fp32", "--device", "cpu")
    tensors = json.loads((out / "merge.json").read_text(encoding="utf-8"))["tensors"]
    assert tensors["seen"] == tensors["adapted"] > 0
    assert tensors["error"] < 2e-5
    assert 0.999 < tensors["least"] <= tensors["most"] < 1.001


def test_what_is_wrong_is_one_sentence(
    run: Path, faint: Path, tiny_model: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    out = tmp_path / "out"
    assert "is there already" in refusal("merge", run, "--out", there)
    assert "is there already" in refusal("merge", run, "--out", tmp_path / "link")
    for words, says in (
        (("--onto", "8bit"), "--onto 8bit"),
        (("--dtype", "int8"), "--dtype int8"),
        (("--shard-size", "large"), "--shard-size large"),
        (("--device", "tpu"), "--device tpu"),
        (("--data", "no.jsonl", "--device", "cpu"), "no.jsonl"),
    ):
        assert says in refusal("merge", run, "--out", out, *words)
    other = save_family(FAMILIES["qwen 3"].make, tiny_model, tmp_path / "other")
    assert "another base model" in refusal("merge", faint, "--out", out, "--base", other)
    silent = shutil.copytree(tiny_model, tmp_path / "silent")
    for file in silent.glob("token*"):
        file.unlink()
    assert "tokenizer" in refusal("merge", run, "--out", out, "--base", silent)
    assert not out.exists()
    assert not (tmp_path / ".out.partial").exists()


def test_what_a_killed_merge_left_is_taken_away(run: Path, tmp_path: Path) -> None:
    left = tmp_path / ".merged.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    halfbyte("merge", run, "--out", tmp_path / "merged", "--device", "cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_leaves_nothing(
    run: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the weights, behind them, in the tokenizer, and in the last file of all."""
    words = ("merge", run, "--dtype", "fp32", "--device", "cpu", "--out")
    halfbyte(*words, tmp_path / "whole")
    pages = {p.name: -(-p.stat().st_size // 4096) for p in (tmp_path / "whole").iterdir()}
    assert "GB free" in refusal(*words, small_disk / "merged")  # looked at before
    monkeypatch.setattr("halfbyte.export.new_folder.require_space", lambda *_: None)
    weights, tokenizer = pages["model.safetensors"], pages["tokenizer.json"]
    filler = small_disk / "filler"
    for free in (weights // 2, weights, weights + 2 + tokenizer // 2, sum(pages.values()) - 1):
        filler.write_bytes(b"")
        room = shutil.disk_usage(small_disk).free
        filler.write_bytes(b"x" * (room - 4096 * free))
        assert "nothing of it is kept" in refusal(*words, small_disk / "merged"), free
        assert [p.name for p in small_disk.iterdir()] == ["filler"]
