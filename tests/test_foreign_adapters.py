"""Adapters of other programs give the logits that PEFT gives on bitsandbytes' layers, or a sentence
says why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from command_line import halfbyte
from foreign_case import (
    OLD_KEYS,
    as_axolotl,
    as_unsloth,
    base_of,
    config_of,
    save_random,
    write_config,
)
from halfbyte.cli.app import app
from halfbyte.errors import HalfbyteError
from halfbyte.finished.opened import OpenedAdapter, open_adapter
from lora_case import logits_of, make_rows, our_logits, peft_logits, save_models
from oracle.case import save_model

ROWS = make_rows(310)
# Family, rows added to the vocabulary, and PEFT's settings.
KINDS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "every linear layer": ("llama", 0, {"target_modules": "all-linear"}),
    "some layers, by an expression": ("llama", 0, {"target_modules": r".*\.1\..*(q|v)_proj"}),
    "some layers, by number": ("llama", 0, {"layers_to_transform": [1]}),
    "rsLoRA": ("llama", 0, {"use_rslora": True}),
    "patterns": (
        "llama",
        0,
        {
            "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.up_proj": 2},
            "alpha_pattern": {"k_proj": 32, "model.layers.0.self_attn.v_proj": 1},
        },
    ),
    "patterns with rsLoRA": ("llama", 0, {"rank_pattern": {"v_proj": 9}, "use_rslora": True}),
    "DoRA": ("llama", 0, {"use_dora": True}),
    "embedding and head whole": ("llama", 0, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "head whole": ("llama", 0, {"modules_to_save": ["lm_head"]}),
    "embedding whole, once tied": ("qwen3", 0, {"modules_to_save": ["embed_tokens"]}),
    "both whole, once tied": ("qwen3", 0, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "both whole, still tied": (
        "qwen3",
        0,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "rows of tokens": ("llama", 0, {"trainable_token_indices": [9, 5, 40]}),
    "rows of tokens, tied": ("qwen3", 0, {"trainable_token_indices": [5, 9, 300]}),
    "rows that follow one another": ("qwen3", 0, {"trainable_token_indices": [7, 8]}),
    "more tokens": ("llama", 8, {}),
    "more tokens, tied": ("qwen3", 8, {}),
    "more tokens, embedding whole, once tied": ("qwen3", 8, {"modules_to_save": ["embed_tokens"]}),
    "more tokens, both whole": ("llama", 8, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "head": ("llama", 0, {"target_modules": ["q_proj", "lm_head"]}),
    "head, once tied": ("qwen3", 0, {"target_modules": ["v_proj", "lm_head"]}),
    "head, more tokens": ("llama", 8, {"target_modules": ["q_proj", "lm_head"]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory, "llama", "qwen3")


@pytest.fixture(scope="module")
def plain(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("plain") / "adapter", bases["llama"])


def assert_is_peft(opened: OpenedAdapter, folder: Path, base: Path, more_rows: int = 0) -> None:
    """Logits with the adapter are PEFT's, and without it the base's."""
    ours = our_logits(opened.qlora, ROWS)
    with torch.no_grad():
        theirs = peft_logits(folder, base_of(base, more_rows), ROWS)
        without = logits_of(base_of(base), ROWS)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    known = slice(without.shape[1])
    assert (theirs[:, known] - without).abs().max() > 0.05 * without.abs().max()
    with opened.qlora.adapter_on(False):
        off = our_logits(opened.qlora, ROWS)
    assert (off[:, known] - without).abs().max() <= 1e-5 * without.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_the_same_logits(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    family, more_rows, settings = KINDS[kind]
    folder = save_random(tmp_path / "adapter", bases[family], more_rows, **settings)
    opened = open_adapter(folder, device="cpu")
    assert_is_peft(opened, folder, bases[family], more_rows)


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}<assistant> "


def test_folders_of_other_programs(plain: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    unsloth = as_unsloth(plain, base, tmp_path / "lora_model", TEMPLATE)
    axolotl = as_axolotl(plain, base, tmp_path / "checkpoint-20")
    for folder in (unsloth, axolotl):
        opened = open_adapter(folder, base=str(base), device="cpu")
        assert_is_peft(opened, plain, base)
        assert opened.found.run is None
    opened = open_adapter(unsloth, base=str(base), device="cpu")
    said = opened.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert said == "<user> Hi\n<assistant> "

    # Several templates are a list there, as some bases have them; the default one is taken.
    written = json.loads((unsloth / "tokenizer_config.json").read_text())
    named = [{"name": n, "template": t} for n, t in (("rag", "no"), ("default", TEMPLATE))]
    (unsloth / "tokenizer_config.json").write_text(json.dumps(written | {"chat_template": named}))
    opened = open_adapter(unsloth, base=str(base), device="cpu")
    said = opened.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert said == "<user> Hi\n<assistant> "

    narrow = shutil.copytree(plain, tmp_path / "narrow")
    weights = load_file(narrow / "adapter_model.safetensors")
    weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(weights, narrow / "adapter_model.safetensors")
    assert_is_peft(open_adapter(narrow, device="cpu"), narrow, base)

    old = shutil.copytree(plain, tmp_path / "old")
    config = {key: value for key, value in config_of(old).items() if key in OLD_KEYS}
    write_config(old, config | {"enable_lora": None, "merge_weights": False})
    assert_is_peft(open_adapter(old, device="cpu"), plain, base)


def test_a_base_that_is_in_four_bits_already(
    plain: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    base_of(bases["llama"]).save_pretrained(tmp_path / "base-bnb-4bit")
    for path in bases["llama"].glob("token*"):
        shutil.copy(path, tmp_path / "base-bnb-4bit")
    opened = open_adapter(plain, base=str(tmp_path / "base-bnb-4bit"), device="cpu")
    assert_is_peft(opened, plain, bases["llama"])


def test_tokens_of_the_adapter_s_own(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = save_random(tmp_path / "adapter", bases["llama"], 2)
    tokenizer = AutoTokenizer.from_pretrained(bases["llama"])
    size = len(tokenizer)
    tokenizer.add_tokens([f"<spare{n}>" for n in range(320 - size)] + ["<tool>", "</tool>"])
    tokenizer.save_pretrained(folder)
    opened = open_adapter(folder, device="cpu")
    ids = opened.tokenizer("<tool></tool>", add_special_tokens=False).input_ids
    assert ids == [320, 321]
    assert_is_peft(opened, folder, bases["llama"], 2)
    # Without the rows of its new tokens it cannot be asked.
    weights = load_file(folder / "adapter_model.safetensors")
    bare = {name: tensor for name, tensor in weights.items() if "lora_" in name}
    save_file(bare, folder / "adapter_model.safetensors")
    with pytest.raises(HalfbyteError, match=r"has 322 tokens, and .* has 320 rows of embedding"):
        open_adapter(folder, device="cpu")
    # But where the only new one fills up batches, which is never read.
    tokenizer = AutoTokenizer.from_pretrained(bases["llama"])
    tokenizer.add_tokens([f"<spare{n}>" for n in range(320 - size)])
    tokenizer.add_special_tokens({"pad_token": "<fill>"})
    tokenizer.save_pretrained(folder)
    assert open_adapter(folder, device="cpu").tokenizer.pad_token_id == 320


def changed(**settings: Any) -> Callable[[Path], None]:
    return lambda folder: write_config(folder, config_of(folder) | settings)


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def renamed(old: str, new: str) -> Callable[[Path], None]:
    def rename(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file({k.replace(old, new): v for k, v in load_file(path).items()}, path)

    return rename


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (pickled, "is pickled (adapter_model.bin), which can run code"),
        (changed(peft_type="ADALORA"), "not of a LoRA adapter but of 'ADALORA'"),
        (changed(peft_type="IA3"), "not of a LoRA adapter but of 'IA3'"),
        (changed(bias="all"), "sets bias"),
        (changed(lora_bias=True), "sets lora_bias"),
        (changed(alora_invocation_tokens=[5]), "sets alora_invocation_tokens"),
        (changed(layer_replication=[[0, 2]]), "sets layer_replication"),
        (changed(init_lora_weights="pissa_niter_4"), "path_initial_model_for_weight_conversion"),
        (changed(r=2), "is damaged, or its configuration is another's"),
        (changed(rank_pattern={"(a+)+$": 4}, r="x"), "r that is no number above 0"),
        (changed(base_model_name_or_path=None), "names no base model; name it with --base"),
        *(
            (
                changed(base_model_name_or_path=gone),
                "not on this machine; name where it is with --b",
            )
            for gone in ("/workspace/base", "./out/base", "C:\\models\\base", "a/b/c")
        ),
        (renamed("lora_A", "ia3_l"), "which no LoRA adapter has"),
        (lambda folder: None, "has a chat template, so nothing says how it is prompted"),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(
    change: Callable[[Path], None], says: str, plain: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(plain, tmp_path / "adapter")
    change(folder)
    done = CliRunner().invoke(app, ["chat", str(folder), "--device", "cpu"], input="Hi\n")
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "low-rank matrices of the embedding"),
        ({"modules_to_save": ["norm"]}, "has trained input_layernorm, norm"),
        ({"init_lora_weights": "olora"}, "has init_lora_weights = 'olora'"),
        ({"target_modules": ["q_proj", "lm_head"], "use_dora": True}, "DoRA on the output head"),
    ],
)
def test_what_peft_makes_and_halfbyte_does_not_read(
    settings: dict[str, Any], says: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = save_random(tmp_path / "adapter", bases["llama"], **settings)
    with pytest.raises(HalfbyteError, match=says):
        open_adapter(folder, device="cpu")


def test_a_base_of_another_size_is_refused(plain: Path, tmp_path: Path) -> None:
    for name, settings, says in (
        ("narrow", {"intermediate_size": 64}, r"of 96 × \d+ weights|weights, and that of"),
        ("short", {"num_hidden_layers": 1}, "of another base model"),
    ):
        save_model(tmp_path / name, "llama", **settings)
        with pytest.raises(HalfbyteError, match=says) as error:
            open_adapter(plain, base=str(tmp_path / name), device="cpu")
        assert str(error.value).count("\n") == 0


def test_chat_with_an_adapter_from_elsewhere(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_random(tmp_path / "adapter", tiny_model)
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    write_config(folder, config_of(folder) | {"base_model_name_or_path": "/gone/base"})
    prompt = "<|im_start|>user\nSay 3.<|im_end|>\n<|im_start|>assistant\n"
    opened = open_adapter(folder, base=str(moved), device="cpu")
    ids = opened.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    expected = peft_answer(folder, moved, ids)
    said = CliRunner().invoke(
        app,
        ["chat", str(folder), "--base", str(moved), "--device", "cpu", "--max-new-tokens", "12"],
        input="Say 3.\n",
    )
    assert said.exit_code == 0, said.output
    text = opened.tokenizer.decode(expected, skip_special_tokens=True).rstrip("\ufffd")
    assert said.stdout.rstrip() == text.rstrip()
    assert said.stderr == ""
    halfbyte("chat", folder, "--base", tmp_path / "nowhere", code=2)


@torch.no_grad()
def peft_answer(folder: Path, base: Path, ids: torch.Tensor) -> torch.Tensor:
    import peft

    model = peft.PeftModel.from_pretrained(base_of(base), folder).eval()
    return model.generate(input_ids=ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]


def test_json_of_strangers(plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "adapter")
    for text in ("[" * 100_000, "{", "7", '"\ud800"'.encode("utf-8", "surrogatepass"), b"\xff\xfe"):
        raw = text if isinstance(text, bytes) else text.encode()
        (folder / "adapter_config.json").write_bytes(raw)
        with pytest.raises(HalfbyteError) as error:
            open_adapter(folder, device="cpu")
        assert json.dumps(str(error.value)).count("\\n") == 0
