"""Sizes that lie: refused in a sentence, quickly, and before memory is taken for them."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from halfbyte.errors import DataError, HalfbyteError, ModelError
from halfbyte.foreign_json import parse_json, read_json
from safety_case import GIGABYTE, refused, with_little_memory

# All is refused by a child that may take so much more memory, and so much of a processor.
MEMORY, SECONDS = GIGABYTE, 60


def what_a_child_says(calls: dict[str, str]) -> dict[str, str]:
    """What each call raises, all of them in one child: one sentence of a HalfbyteError."""
    code = "\n".join(
        [
            "from pathlib import Path",
            "import torch",
            "from halfbyte.errors import HalfbyteError",
            "from halfbyte.model.source import open_model, open_tokenizer",
            "from halfbyte.model.load import load_base",
            "from halfbyte.model.adapter_files import read_adapter",
            "from halfbyte.data.source import read_rows",
            "from halfbyte.recipe.load import parse_recipe",
            "from halfbyte.recipe.data_schema import SourceRecipe",
            "from halfbyte.recipe.schema import ModelRecipe, QuantizationRecipe",
            "import gguf, pyarrow.parquet, transformers",
            "import halfbyte.data.text_file as text_file",
            "text_file.MOST_UNPACKED = 64 << 20  # a gigabyte takes its time",
            "def load(name):",
            "    kind = torch.float32",
            "    load_base(open_model(ModelRecipe(name=name)), quantization=QuantizationRecipe(),",
            "              device='cpu', compute_dtype=kind, rest_dtype=kind)",
            "def rows(path):",
            "    read_rows(SourceRecipe(path=path))",
            "found = {}",
            "begin()",
            f"for name, call in {calls!r}.items():",
            "    try:",
            "        exec(call)",
            "        found[name] = 'nothing was raised'",
            "    except HalfbyteError as error:",
            "        found[name] = 'said: ' + str(error)",
            "    except BaseException as error:",
            "        found[name] = f'{type(error).__name__}: {error}'",
        ]
    )
    return dict(with_little_memory(code, memory=MEMORY, seconds=SECONDS))


def sparse(path: Path, start: bytes, size: int) -> None:
    """A file of ``size`` bytes that takes no room behind its ``start``."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


# ---- safetensors ---------------------------------------------------------------------------------


def safetensors(header: Any, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


WEIGHTS = {
    "a header of 10^15 bytes": struct.pack("<Q", 10**15) + b"{}",
    "a header of 2^64 - 1 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "nothing": b"",
    "half a length": b"\x10\x00",
    "more than there is": safetensors({"a": tensor([1 << 20], 0, 4 << 20)}),
    "a shape that overflows": safetensors({"a": tensor([1 << 33, 1 << 33], 0, 64)}),
    "a shape that is no such size": safetensors({"a": tensor([7], 0, 64)}),
    "a size below nothing": safetensors({"a": tensor([-16], 0, 64)}),
    "an end before the beginning": safetensors({"a": tensor([16], 64, 0)}),
    "tensors over one another": safetensors({"a": tensor([16], 0, 64), "b": tensor([16], 0, 64)}),
    "a hole": safetensors({"a": tensor([4], 0, 16), "b": tensor([4], 48, 64)}),
    "a kind that there is not": safetensors({"a": tensor([16], 0, 64, "F31")}),
    "deep nesting": safetensors(b"[" * 100_000),
    "no object": safetensors(b"[1, 2]"),
    "a number of 10^5 digits": safetensors(
        b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 64]}}' % (b"9" * 100_000)
    ),
}


def weights_that_lie(folder: Path, tiny_model: Path) -> Iterator[tuple[str, str]]:
    for number, (what, content) in enumerate(WEIGHTS.items()):
        model, adapter = folder / f"weights-{number}", folder / f"adapter-{number}"
        shutil.copytree(tiny_model, model)
        (model / "model.safetensors").write_bytes(content)
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1000000000}')
        (adapter / "adapter_model.safetensors").write_bytes(content)
        yield f"safetensors: {what}", f"open_model(ModelRecipe(name={str(model)!r}))"
        yield f"adapter: {what}", f"read_adapter(Path({str(adapter)!r}))"


# ---- GGUF ----------------------------------------------------------------------------------------

TEXT, ARRAY, UINT8, UINT32 = 8, 9, 0, 4


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def gguf(tensors: int, pairs: int, content: bytes, size: int = 4096) -> bytes:
    return (b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + content).ljust(size, b"\0")


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


ARCHITECTURE = pair(b"general.architecture", TEXT, text(b"llama"))


def shaped(sizes: list[int], kind: int = 0, offset: int = 0) -> bytes:
    """One tensor and no weights for it."""
    about = text(b"token_embd.weight") + struct.pack("<I", len(sizes))
    about += struct.pack(f"<{len(sizes)}Q", *sizes) + struct.pack("<IQ", kind, offset)
    return gguf(1, 1, ARCHITECTURE + about)


def numbers(count: int, kind: int = UINT32) -> bytes:
    return struct.pack("<IQ", kind, count)


GGUFS = {
    "2^60 tensors": gguf(1 << 60, 1, ARCHITECTURE),
    "2^60 settings": gguf(0, 1 << 60, ARCHITECTURE),
    "a key of 2^60 bytes": gguf(0, 1, struct.pack("<Q", 1 << 60)),
    "a text of 2^60 bytes": gguf(0, 1, text(b"a") + struct.pack("<IQ", TEXT, 1 << 60)),
    "an array of 2^60 numbers": gguf(0, 1, pair(b"a", ARRAY, numbers(1 << 60))),
    "an array of 2^62 bytes": gguf(0, 1, pair(b"a", ARRAY, numbers(1 << 62, UINT8))),
    "an array of 2^60 texts": gguf(0, 1, pair(b"a", ARRAY, numbers(1 << 60, TEXT))),
    "arrays of arrays": gguf(0, 1, pair(b"a", ARRAY, numbers(1, ARRAY) * 100_000), 2_000_000),
    "a kind that there is not": gguf(0, 1, pair(b"a", 99, bytes(8))),
    "a shape that overflows": shaped([1 << 33, 1 << 33]),
    "a shape of nothing": shaped([0, 8]),
    "2^30 dimensions": gguf(1, 1, ARCHITECTURE + text(b"a") + struct.pack("<I", 1 << 30)),
    "weights behind the end": shaped([32, 8], offset=1 << 40),
    "weights below the beginning": shaped([32, 8], offset=(1 << 64) - 4096),
    "no alignment": gguf(0, 1, pair(b"general.alignment", UINT32, struct.pack("<I", 0))),
    "2^32 layers": gguf(
        0, 2, ARCHITECTURE + pair(b"llama.block_count", UINT32, struct.pack("<I", 2**32 - 1))
    ),
    "half a header": b"GGUF\x03\x00\x00\x00\x01",
    "nothing": b"",
}


def gguf_files_that_lie(folder: Path) -> Iterator[tuple[str, str]]:
    for number, (what, content) in enumerate(GGUFS.items()):
        path = folder / f"model-{number}.gguf"
        path.write_bytes(content)
        yield f"GGUF: {what}", f"open_model(ModelRecipe(name={str(path)!r}))"
    large = folder / "large.gguf"
    sparse(large, gguf(0, 1, struct.pack("<Q", 1 << 37)), 1 << 38)
    yield "GGUF: a key of 128 GB that are there", f"open_model(ModelRecipe(name={str(large)!r}))"


# ---- configurations ------------------------------------------------------------------------------

CONFIGS: dict[str, dict[str, object]] = {
    "layers": {"num_hidden_layers": 10**6},
    "more layers": {"num_hidden_layers": 10**12},
    "layers that the weights lack": {"num_hidden_layers": 3000},
    "labels": {"num_labels": 10**9},
    "heads": {"num_attention_heads": 10**9, "num_key_value_heads": 10**9},
    "a hidden size": {"hidden_size": 10**9},
    "a larger hidden size": {"hidden_size": 1 << 20, "intermediate_size": 1 << 22},
    "a vocabulary": {"vocab_size": 10**12},
    "no layers": {"num_hidden_layers": -1},
    "a size below nothing": {"hidden_size": -32},
    "no heads": {"num_attention_heads": 0},
    "a head": {"head_dim": 1 << 38},
    "a text": {"hidden_size": "32" * 10_000},
    "a list": {"hidden_size": [32] * 1000},
    "infinity": {"hidden_size": float("inf")},
    "a float": {"num_hidden_layers": 1e300},
}


def configurations_that_lie(folder: Path, tiny_model: Path) -> Iterator[tuple[str, str]]:
    config = json.loads((tiny_model / "config.json").read_text())
    for number, (what, values) in enumerate(CONFIGS.items()):
        model = folder / f"config-{number}"
        shutil.copytree(tiny_model, model)
        (model / "config.json").write_text(json.dumps({**config, **values}))
        yield f"configuration: {what}", f"load({str(model)!r})"


# ---- JSON and YAML -------------------------------------------------------------------------------

JSON = {
    "deep nesting": "[" * 200_000,
    "objects in objects": '{"a":' * 200_000,
    "nested and closed": "[" * 5000 + "]" * 5000,
    "nested and closed, not so deep": '{"a": ' + "[" * 500 + "]" * 500 + "}",
    "a number of 10^5 digits": '{"a": ' + "9" * 100_000 + "}",
}


@pytest.mark.parametrize("what", JSON)
def test_json_that_harms(tmp_path: Path, tiny_model: Path, what: str) -> None:
    with pytest.raises(ValueError, match=r"nested more than|digits"):
        parse_json(JSON[what])
    from halfbyte.data.source import read_rows
    from halfbyte.events import read_events
    from halfbyte.model.adapter_files import read_adapter
    from halfbyte.model.source import open_model
    from halfbyte.recipe.data_schema import SourceRecipe
    from halfbyte.recipe.schema import ModelRecipe

    for name in ("rows.json", "rows.jsonl"):
        (tmp_path / name).write_text(
            f'[{{"a": {JSON[what]}}}]' if name == "rows.json" else JSON[what]
        )
        with pytest.raises(DataError, match=name):
            read_rows(SourceRecipe(path=str(tmp_path / name)))
    (tmp_path / "events.jsonl").write_text(JSON[what] + "\n")
    assert list(read_events(tmp_path)) == []
    (tmp_path / "adapter_config.json").write_text(JSON[what])
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        read_adapter(tmp_path)
    for file in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        shutil.copytree(tiny_model, tmp_path / file)
        (tmp_path / file / file).write_text(JSON[what])
        with pytest.raises(ModelError, match=r"tokenizer|config\.json"):
            open_model(ModelRecipe(name=str(tmp_path / file)))


def test_what_json_may_hold() -> None:
    """What is as deep as a tool's description passes, and numbers without an end are infinite."""
    deep: Any = 1
    for _ in range(90):
        deep = [deep]
    assert parse_json(json.dumps(deep)) == deep
    assert parse_json("[1e999, -1e999]") == [float("inf"), float("-inf")]
    wide = {"a": [[n] for n in range(1000)]}
    assert parse_json(json.dumps(wide)) == wide


def test_a_file_that_never_ends(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    sparse(tmp_path / "large.json", b"[", 1 << 40)
    for name in ("pipe.json", "zero.json", "large.json"):
        with pytest.raises((ValueError, OSError)):
            read_json(tmp_path / name)


RECIPES = {
    "aliases": "a: &a [x, x]\n"
    + "".join(f"{c}: &{c} [*{b}, *{b}]\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True)),
    "deep nesting": "data: " + "[" * 100_000,
    "keys in keys": "data: " + "{a: " * 50_000,
    "lists in lists": "- " * 200_000,
    "a number of 10^5 digits": "seed: " + "9" * 100_000,
    "a number without an end": "lora: {lora_alpha: 1e999}",
    "an object of Python's": "model: !!python/object/apply:os.mkdir [executed]",
    "a file": "model: !include /etc/passwd",
    "more than a megabyte": "#" * 1_100_000,
    "a key of 10^5 letters": "a" * 100_000 + ": 1\n",
    "long keys": "? " * 100_000,
}


@pytest.mark.parametrize("what", RECIPES)
def test_recipes_that_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPES[what])
    assert "recipe.yaml" in refused("recipe", "recipe.yaml")


# ---- tables --------------------------------------------------------------------------------------


def nulls(folder: Path) -> None:
    """Rows of nothing, of which a file holds as many as it likes."""
    batch = pyarrow.RecordBatch.from_arrays([pyarrow.nulls(12_345_678)], ["output"])
    with pyarrow.ipc.new_stream(folder / "rows.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    content = (folder / "rows.arrow").read_bytes()
    few, many = struct.pack("<q", 12_345_678), struct.pack("<q", 1 << 40)
    assert few in content
    (folder / "rows.arrow").write_bytes(content.replace(few, many))


def megabytes_in_gzip(folder: Path) -> None:
    """The same text over and over, of which little is a lot."""
    piece = gzip.compress(b'{"output": "' + b"a" * (16 << 20) + b'"}\n')
    (folder / "rows.jsonl.gz").write_bytes(piece * 8)


def wrong_offsets(folder: Path) -> None:
    """Texts that begin where the file's own memory does not go."""
    batch = pyarrow.RecordBatch.from_pydict({"output": ["hello", "there", "again"]})
    with pyarrow.ipc.new_stream(folder / "rows.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    offsets, wrong = struct.pack("<4i", 0, 5, 10, 15), struct.pack("<4i", 0, 1 << 30, 10, 1 << 30)
    content = (folder / "rows.arrow").read_bytes()
    assert content.count(offsets) == 1
    (folder / "rows.arrow").write_bytes(content.replace(offsets, wrong))


def tables_that_lie(folder: Path) -> Iterator[tuple[str, str]]:
    for make in (nulls, megabytes_in_gzip, wrong_offsets):
        inside = folder / make.__name__
        inside.mkdir()
        make(inside)
        [path] = inside.iterdir()
        yield f"table: {make.__name__}", f"rows({str(path)!r})"


# ---- all of them in one child --------------------------------------------------------------------


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("lies")
    calls = [
        *weights_that_lie(folder, tiny_model),
        *gguf_files_that_lie(folder),
        *configurations_that_lie(folder, tiny_model),
        *tables_that_lie(folder),
    ]
    assert len(dict(calls)) == len(calls)
    return what_a_child_says(dict(calls))


@pytest.mark.parametrize(
    ("kind", "word", "count"),
    [
        ("safetensors", "safetensors", len(WEIGHTS)),
        ("adapter", "adapter_model.safetensors", len(WEIGHTS)),
        ("GGUF", ".gguf", len(GGUFS) + 1),
        ("configuration", "config-", len(CONFIGS)),
        ("table", "rows.", 3),
    ],
)
def test_figures_that_lie(said: dict[str, str], kind: str, word: str, count: int) -> None:
    """One sentence that names the file, and no memory for what the figures speak of."""
    told = {what: text for what, text in said.items() if what.startswith(f"{kind}: ")}
    assert len(told) == count
    for what, text in told.items():
        assert text.startswith("said: "), (what, text)
        assert word in text, (what, text)


def test_tables_that_are_cut(tmp_path: Path, tiny_rows: Path) -> None:
    """Every tenth of a file, and one byte of its end wrong."""
    from halfbyte.data.source import read_rows
    from halfbyte.recipe.data_schema import SourceRecipe

    rows = [json.loads(line) for line in tiny_rows.read_text().splitlines()]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pyarrow.ipc.new_file(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("rows.parquet", "rows.arrow"):
        whole = (tmp_path / name).read_bytes()
        for tenth in range(10):
            (tmp_path / name).write_bytes(whole[: len(whole) * tenth // 10])
            with pytest.raises(HalfbyteError, match=name):
                read_rows(SourceRecipe(path=str(tmp_path / name)))
