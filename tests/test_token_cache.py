"""Tokenized rows kept in the user's cache directory."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from halfbyte.data import token_cache
from halfbyte.data.batch import TokenizedRow
from halfbyte.data.rendered import Rendered
from halfbyte.data.row_store import RowWriter
from halfbyte.data.token_cache import content_key, find_rows, keep_rows


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "halfbyte" / "tokens"


def writes(count: int) -> Callable[[RowWriter], Rendered]:
    def write(writer: RowWriter) -> Rendered:
        found = Rendered()
        for n in range(count):
            ids = np.arange(n + 1, dtype=np.int32)
            writer.extend([TokenizedRow(ids, ids > 0, n)])
            found.places.append(2 * n)
            found.turns.extend(range(n))
            found.turn_ends.append(len(found.turns))
        found.refused.append(1)
        found.refused_why.append(0)
        found.reasons.append(("kind", "why"))
        return found

    return write


def test_what_was_kept_is_found_and_nobody_else_may_read_it(home: Path) -> None:
    key = content_key([b"rows"])
    assert find_rows(key) is None
    kept = keep_rows(key, writes(3))
    found = find_rows(key)
    assert found is not None
    assert kept[1] == found[1]
    for rows, rendered in (kept, found):
        assert [row.input_ids.tolist() for row in rows] == [[0], [0, 1], [0, 1, 2]]
        assert rows.labels.tolist() == [0, 1, 2]
        assert [rendered.turns_of(row) for row in range(3)] == [None, (0,), (0, 1)]
        assert rendered.reasons == [("kind", "why")]
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / key).stat().st_mode) == 0o700
    assert len(keep_rows(key, writes(2))[0]) == 2
    again = find_rows(key)
    assert again is not None
    assert len(again[0]) == 2


def test_what_is_damaged_is_not_there(home: Path) -> None:
    keep_rows("key", writes(3))
    folder = home / "key"
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for damaged in (b"", whole[:-3], whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:]):
            path.write_bytes(damaged)
            if path.suffix != ".npz" or len(damaged) < len(whole):
                assert find_rows("key") is None, path.name
        path.write_bytes(whole)
        assert find_rows("key") is not None
    numbers = bytearray((folder / "rendered.npz").read_bytes())
    numbers[len(numbers) // 8] ^= 1
    (folder / "rendered.npz").write_bytes(numbers)
    assert find_rows("key") is None


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
    def fails(writer: RowWriter) -> Rendered:
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
    for key in ("key", None):
        rows, _ = keep_rows(key, writes(2))
        assert [len(row) for row in rows] == [1, 2]
