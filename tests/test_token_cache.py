"""Tokenized rows kept in the user's cache directory."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from halfbyte.data import token_cache
from halfbyte.data.batch import TokenizedRow
from halfbyte.data.row_store import RowWriter
from halfbyte.data.token_cache import content_key, find_rows, keep_rows


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "halfbyte" / "tokens"


def writes(count: int) -> object:
    def write(writer: RowWriter) -> None:
        for n in range(count):
            ids = np.arange(n + 1, dtype=np.int32)
            writer.extend([TokenizedRow(ids, ids > 0, n)])

    return write


def test_what_was_kept_is_found_and_nobody_else_may_read_it(home: Path) -> None:
    key = content_key([b"rows"])
    assert find_rows(key) is None
    kept = keep_rows(key, writes(3))
    found = find_rows(key)
    assert found is not None
    for rows in (kept, found):
        assert [row.input_ids.tolist() for row in rows] == [[0], [0, 1], [0, 1, 2]]
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / key).stat().st_mode) == 0o700
    (home / key / "ids.bin").write_bytes(b"")
    assert find_rows(key) is None
    assert len(keep_rows(key, writes(2))) == 2
    again = find_rows(key)
    assert again is not None
    assert len(again) == 2


def test_keys_tell_parts_apart() -> None:
    assert content_key([b"ab", b"c"]) != content_key([b"a", b"bc"])
    assert content_key([b"ab"]) == content_key(iter([b"ab"]))


def test_the_oldest_goes_first(home: Path) -> None:
    keys = [content_key([bytes([n])]) for n in range(token_cache.MOST + 2)]
    for n, key in enumerate(keys[:-1]):
        keep_rows(key, writes(1))
        os.utime(home / key, (n, n))
    assert find_rows(keys[1]) is not None  # used again, so it is young
    keep_rows(keys[-1], writes(1))
    left = {folder.name for folder in home.iterdir()}
    assert left == {keys[1], *keys[3:]}


def test_a_failure_leaves_nothing(home: Path) -> None:
    def fails(writer: RowWriter) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        keep_rows("key", fails)
    assert list(home.iterdir()) == []


def test_without_a_place_the_rows_are_there_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert find_rows("key") is None
    rows = keep_rows("key", writes(2))
    assert [len(row) for row in rows] == [1, 2]
