"""Reading rows from files, folders and the hub."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.data.source import read_rows
from halfbyte.data.table import Table
from halfbyte.errors import DataError
from halfbyte.recipe.data_schema import SourceRecipe

ROWS = [
    {"instruction": "Say 1.", "input": "", "output": 'He said "one";\nthen, he left.'},
    {"instruction": "Größe, Maß?", "input": "a;b|c\td", "output": "Σ 字 😀"},
    {"instruction": "Third", "input": " x ", "output": "end"},
]


def read(path: Path | str, limit: int | None = None, **data: Any) -> Table:
    return read_rows(SourceRecipe(path=str(path), **data), limit)


def refused(path: Path | str, limit: int | None = None, **data: Any) -> str:
    """The sentence with which a source is refused."""
    with pytest.raises(DataError) as caught:
        read(path, limit, **data)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def csv_text(rows: list[dict[str, str]], **dialect: Any) -> str:
    """As Python's own writer puts it."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), **dialect)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


# ---- CSV ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_dialects(
    tmp_path: Path, delimiter: str, encoding: str, line_end: str, quoting: int
) -> None:
    text = csv_text(ROWS, delimiter=delimiter, lineterminator=line_end, quoting=quoting)
    path = tmp_path / "rows.csv"
    path.write_bytes(text.encode(encoding))
    table = read(path)
    assert table.rows == ROWS
    assert table.columns == ["instruction", "input", "output"]
    assert table.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert table.warnings == []
    packed = tmp_path / "rows.csv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(packed, 2).rows == ROWS[:2]
    assert read(packed, 2).sha256 == hashlib.sha256(packed.read_bytes()).hexdigest()


cell = st.lists(st.sampled_from([*"a b,;|\t\"'\n\ré字", "\r\n"]), max_size=8).map("".join)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cells=st.lists(st.tuples(cell, cell, cell), min_size=1, max_size=6),
    delimiter=st.sampled_from(",;\t|"),
)
def test_any_cells_that_a_writer_puts_out_come_back(
    tmp_path: Path, cells: list[tuple[str, str, str]], delimiter: str
) -> None:
    rows = [dict(zip(("question", "context", "answer"), row, strict=True)) for row in cells]
    path = tmp_path / "any.tsv"  # whose delimiter is known: what a few odd cells hint at is not
    text = csv_text(rows, delimiter="\t", quoting=csv.QUOTE_ALL)
    path.write_bytes(text.encode())
    expected = [row for row in rows if any(row.values())]
    if expected:
        assert read(path).rows == expected
    # With a header and ordinary text around, the delimiter is found whatever the cells hold.
    usual = [{"question": "What?", "context": "Here.", "answer": "This."}] * 6
    path = tmp_path / "any.csv"
    path.write_bytes(csv_text(usual + rows, delimiter=delimiter).encode())
    assert read(path).rows == usual + expected


def test_csv_in_the_encoding_of_an_old_spreadsheet_is_announced(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_bytes("question;answer\r\nWie groß?;5 € – „viel“\r\n".encode("cp1252"))
    table = read(path)
    assert table.rows == [{"question": "Wie groß?", "answer": "5 € – „viel“"}]
    [warning] = table.warnings
    assert "is not UTF-8 and was read as Windows-1252" in warning
    path.write_bytes(b"question;answer\r\n\x81;b\r\n")
    assert "is not all cp1252" in refused(path)


def test_csv_as_spreadsheets_and_programs_leave_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    # A hint for the delimiter, empty lines, an index and an empty margin without names.
    path.write_text("sep=;\n;question;answer;\n\n0;a,b;c;\n;;;\n1;d;e;;\n", encoding="utf-8")
    assert read(path).rows == [{"question": "a,b", "answer": "c"}, {"question": "d", "answer": "e"}]
    # A long cell, over what Python's reader takes by itself and over what is looked at first.
    long = "x, " * 100_000
    path.write_text(csv_text([{"q": "short", "a": long}] * 3), encoding="utf-8")
    assert [row["a"] for row in read(path).rows] == [long] * 3
    assert csv.field_size_limit() == 131_072


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "q,a\n1,2\n3,4,5\n",
            "line 3: 3 cells where the header has 2 (cells are divided by a comma)",
        ),
        ('q;a\n"1\n2";3\n4\n', "line 4: 1 cell where the header has 2"),
        ('q,a\n1,2\n3,"4\n5,6\n', "line 3: this is not CSV"),
        ('q,a\n1,"2"3\n', "line 2: this is not CSV"),
        ("q,a,q\n1,2,3\n", "two columns are called q"),
        ("q,a\n", "holds no rows"),
        ("", "holds no rows"),
        ("\ufeff\n\n", "holds no rows"),
    ],
)
def test_csv_that_is_wrong(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8")
    assert sentence in refused(path)


# ---- JSON and JSONL ----------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json(tmp_path: Path, encoding: str, indent: int | None) -> None:
    path = tmp_path / "rows.json"
    for whole in (ROWS, {"version": 1, "tags": ["x"], "rows": ROWS}):
        path.write_text(json.dumps(whole, indent=indent), encoding=encoding)
        assert read(path).rows == ROWS
        assert read(path, 2).rows == ROWS[:2]
    path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding=encoding)
    assert read(path).rows == ROWS  # one object a line under this name


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [*ROWS, {"output": "a\u2028b\u0085c", "extra": 1}]
    text = "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(text.encode())
    table = read(path)
    assert table.rows == rows
    assert table.columns == ["instruction", "input", "output", "extra"]


def test_no_more_is_read_than_the_limit_needs(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in ROWS]
    for name, text in {
        "rows.jsonl": "\n".join([*lines, "nonsense"]),
        "rows.json": "[" + ",".join([*lines, "nonsense"]),
        "rows.csv": csv_text(ROWS) + "one cell\n",
    }.items():
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        assert read(path, 3).rows == ROWS
        refused(path, 4)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": }\n', "line 3: this is not JSON (expecting value at '}')"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2: a row is an object in braces, not a list"),
        ("a.jsonl", '{"a": 1}\n{"a": "b\n', "line 2: this is not JSON"),
        ("a.jsonl", "", "holds no rows"),
        ("a.json", '[\n{"a": 1},\n{"a" 2}\n]', "line 3: this is not JSON (expecting ':'"),
        ("a.json", '[{"a": 1}\n{"a": 2}]', "line 2: this is not JSON (expecting ',' delimiter"),
        ("a.json", '[{"a": 1}', "line 1: this is not JSON (expecting ',' delimiter where the text"),
        ("a.json", '[{"a": 1}]]', "line 1: this is not JSON (extra data at ']')"),
        ("a.json", '[{"a": 1}, "b"]', "row 2: a row is an object in braces, not a text"),
        ("a.json", '{"a": 1, "b": [1, 2]}', "no list of objects"),
        ("a.json", '{"a": [{"x": 1}], "b": [{"x": 1}]}', "lists of rows under a, b"),
        ("a.json", "[]", "holds no rows"),
        ("a.json", "", "holds no rows"),
    ],
)
def test_json_that_is_wrong(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert sentence in refused(path)


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_bytes(b'[{"a": "gr\xfc\xdf"}]')
        assert "this is not UTF-8" in refused(
            tmp_path / name
        ) or "is not UTF-8 (byte 10)" in refused(tmp_path / name)


# ---- Parquet, folders, the hub ------------------------------------------------------------------


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    table = read(path)
    assert (table.rows, table.columns) == (ROWS, ["instruction", "input", "output"])
    assert read(path, 2).rows == ROWS[:2]
    path.write_bytes(b"PAR1 and nothing more")
    assert "cannot be read as Parquet" in refused(path)


def test_a_folder_saved_by_datasets(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    one = Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    DatasetDict({"train": one, "test": one.select([2])}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "one").rows == ROWS
    assert read(tmp_path / "one", 2).rows == ROWS[:2]
    assert read(tmp_path / "two").rows == ROWS
    assert read(tmp_path / "two", split="test").rows == ROWS[2:]
    assert "data.split takes one of train, test" in refused(tmp_path / "two", split="dev")
    one.select([2, 0]).save_to_disk(tmp_path / "chosen")
    assert read(tmp_path / "chosen").rows == [ROWS[2], ROWS[0]]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rows.csv").touch()
    assert "name the data file in it (there is rows.csv)" in refused(tmp_path / "mine")
    (tmp_path / "one" / "state.json").write_text("{")
    assert "cannot be read" in refused(tmp_path / "one")


@pytest.mark.parametrize("limit", [None, 2])
def test_a_hub_dataset_is_asked_for_without_its_code(
    monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    import datasets

    asked: dict[str, Any] = {}
    found = datasets.Dataset.from_list(ROWS)

    class Builder:
        name = "parquet"

        def as_streaming_dataset(self, split: str) -> Any:
            asked.update(split=split, streaming=True)
            return found.to_iterable_dataset()

        def download_and_prepare(self) -> None:
            asked.update(streaming=False)

        def as_dataset(self, split: str) -> Any:
            asked.update(split=split)
            return found

    def load(path: str, **more: Any) -> Any:
        asked.update(more, path=path)
        return Builder()

    reached = []
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda _, *a, **k: reached.append(a))
    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    table = read("owner/some.rows", limit, split="test", subset="en", revision="v1")
    assert table.rows == ROWS[:limit]
    assert table.columns == ["instruction", "input", "output"]
    assert table.sha256 is None
    assert reached == [("owner/some.rows",)]
    assert asked == {
        "path": "owner/some.rows",
        "name": "en",
        "split": "test",
        "revision": "v1",
        "streaming": limit is not None,
    }
    Builder.name = "webdataset"
    assert "is of the kind webdataset" in refused("owner/some.rows")


def _hub_errors() -> list[tuple[Exception, str]]:
    import datasets.exceptions as d
    import huggingface_hub.errors as h

    def caused(error: Exception, cause: Exception) -> Exception:
        error.__cause__ = cause
        return error

    return [
        (
            caused(ConnectionError("Couldn't reach 'o/n' on the Hub"), h.OfflineModeIsEnabled("x")),
            "the hub cannot be reached",
        ),
        (
            d.DatasetNotFoundError("Dataset 'o/n' doesn't exist on the Hub"),
            "no dataset of this name",
        ),
        (
            d.DatasetNotFoundError("Dataset 'o/n' is a gated dataset on the Hub. Visit …"),
            "is gated; accept its terms at https://huggingface.co/datasets/o/n",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found n.py"),
            "is made by code of its own, which is not executed",
        ),
        (ValueError("Unknown split \"train\". Should be one of ['a']."), "has no split train"),
        (ValueError("BuilderConfig 'x' not found.\nMore."), "cannot be read: BuilderConfig"),
    ]


@pytest.mark.parametrize("number", range(6))
def test_what_the_hub_refuses_is_one_sentence(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    import datasets

    error, sentence = _hub_errors()[number]

    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    assert sentence in refused("o/n")
    # The same where the hub's client says so before.
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", load)
    assert sentence in refused("o/n")


def test_without_a_network_the_sentence_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("tried although the hub was not reached")

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # A port of this machine at which nothing listens.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the hub cannot be reached" in refused("o/n")


# ---- files that are not there, or none of these -------------------------------------------------


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "chatdoctor.json").touch()
    assert f"did you mean {tmp_path / 'chatdoctor.json'}?" not in refused(tmp_path / "other.csv")
    assert f"did you mean {tmp_path / 'chatdoctor.json'}" in refused(tmp_path / "chatdoktor.json")
    assert f"nor a folder {tmp_path / 'no'}" in refused(tmp_path / "no" / "rows.csv")
    (tmp_path / "rows.xlsx").touch()
    assert "is of no kind that is read here" in refused(tmp_path / "rows.xlsx")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    assert "damaged or cut off" in refused(tmp_path / "rows.jsonl.gz")
    (tmp_path / "rows.csv.gz").write_bytes(b"a,b\n1,2\n")
    assert "cannot be read" in refused(tmp_path / "rows.csv.gz")


# ---- Zstandard, Arrow, several files ------------------------------------------------------------


def zst(data: bytes) -> bytes:
    """``data`` packed by Arrow's Zstandard, as a frame."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(data)
    return sink.getvalue().to_pybytes()


def test_zstandard(tmp_path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS]
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(zst(lines[0] + lines[1][:9]) + zst(lines[1][9:] + lines[2]))  # two frames
    assert read(path).rows == ROWS
    assert read(path, 1).rows == ROWS[:1]
    assert read(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path = tmp_path / "rows.csv.zst"
    path.write_bytes(zst(csv_text(ROWS, delimiter=";").encode("utf-16")))
    assert read(path).rows == ROWS
    path = tmp_path / "rows.json.zst"
    whole = zst(json.dumps(ROWS * 500).encode())
    path.write_bytes(whole)
    assert read(path).rows == ROWS * 500
    for damaged in (whole[:-9], whole[:40] + bytes(9) + whole[49:], b"[]"):
        path.write_bytes(damaged)
        assert "is damaged or cut off, or is not Zstandard" in refused(path)


def test_arrow_files_and_streams(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.feather

    whole = pyarrow.Table.from_pylist(ROWS)
    halves = [whole.slice(0, 2).to_batches()[0], whole.slice(2).to_batches()[0]]
    for name, writer in (("a.arrow", pyarrow.ipc.new_file), ("b.arrow", pyarrow.ipc.new_stream)):
        with writer(tmp_path / name, whole.schema) as file:
            for half in halves:
                file.write_batch(half)
    pyarrow.feather.write_feather(whole, tmp_path / "c.feather")
    for path in sorted(tmp_path.iterdir()):
        table = read(path)
        assert (table.rows, table.columns) == (ROWS, ["instruction", "input", "output"])
        assert table.typed
        assert [read(path, n).rows for n in (1, 2)] == [ROWS[:1], ROWS[:2]]
        path.write_bytes(path.read_bytes()[:60])
        assert "cannot be read as Arrow" in refused(path)


def test_several_files_by_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "more").mkdir()
    (tmp_path / "2.jsonl").write_text(json.dumps({"output": "second", "rank": 2}) + "\n")
    (tmp_path / "10.jsonl").write_text(json.dumps({"output": "tenth"}) + "\n")
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"input": "x"}]), tmp_path / "more" / "3.parquet"
    )
    table = read(tmp_path / "*.jsonl")
    assert table.rows == [{"output": "tenth"}, {"output": "second", "rank": 2}]  # by their names
    assert table.columns == ["output", "rank"]
    assert table.files == [(0, str(tmp_path / "10.jsonl")), (1, str(tmp_path / "2.jsonl"))]
    assert not table.typed
    digests = [hashlib.sha256((tmp_path / n).read_bytes()).hexdigest() for n in table_names(table)]
    lines = "".join(f"{digest}\n" for digest in digests)
    assert table.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert read(tmp_path / "*.jsonl", 1).rows == [{"output": "tenth"}]
    every = read(tmp_path / "**" / "*.*")
    assert every.columns == ["output", "rank", "input"]
    assert every.typed
    monkeypatch.chdir(tmp_path)
    assert read("[2-3].jsonl").rows == [{"output": "second", "rank": 2}]
    # A file that has such characters in its own name is that file.
    (tmp_path / "[2-3].jsonl").write_text(json.dumps({"output": "itself"}) + "\n")
    assert read("[2-3].jsonl").rows == [{"output": "itself"}]
    assert refused(tmp_path / "*.csv").startswith(f"no file matches {tmp_path / '*.csv'};")
    (tmp_path / "notes.txt").touch()
    assert "notes.txt is of no kind that is read here" in refused(tmp_path / "*.txt")


def table_names(table: Table) -> list[str]:
    return [Path(path).name for _, path in table.files]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {
                "question": st.text(st.characters(codec="utf-8", exclude_characters="\r\x00")),
                "answer": st.sampled_from(["yes", "no; never", 'he said "one",\nthen left']),
                "turns": st.lists(st.sampled_from(["a", "é"]), min_size=1, max_size=2),
            }
        ),
        min_size=1,
        max_size=5,
    )
)
def test_rows_are_those_that_datasets_reads(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """Each kind of file against the reader of `datasets`, without its cache."""
    from datasets import Dataset

    whole = Dataset.from_list(rows)
    flat = whole.remove_columns("turns")
    whole.to_json(tmp_path / "rows.jsonl", force_ascii=False)
    whole.to_parquet(tmp_path / "rows.parquet")
    flat.to_csv(tmp_path / "rows.csv", index=False)
    readers = {
        "rows.jsonl": Dataset.from_json,
        "rows.parquet": Dataset.from_parquet,
        "rows.csv": Dataset.from_csv,
    }
    for name, reader in readers.items():
        if name == "rows.csv" and not all(row["question"].strip("\n") for row in rows):
            continue  # which pandas reads as nothing
        cache = tmp_path / f"cache-{len(list(tmp_path.iterdir()))}"
        theirs = reader(str(tmp_path / name), cache_dir=str(cache), keep_in_memory=True).to_list()
        texts = name != "rows.csv" or all(isinstance(row["question"], str) for row in theirs)
        if texts:  # pandas takes cells for numbers, dates, or nothing
            assert read(tmp_path / name).rows == theirs
    whole.save_to_disk(tmp_path / "saved")
    [arrow] = (tmp_path / "saved").glob("*.arrow")
    assert read(arrow).rows == whole.to_list() == rows
