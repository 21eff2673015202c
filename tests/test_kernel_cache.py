"""Where compiled kernels are kept, and who may write there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.kernels.cache import VARIABLE, cache_name, use_cache

NAME = cache_name("3.6.0", "2.11.0+cu128", (9, 0), "NVIDIA H100 80GB HBM3")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Set and deleted, so that what the tested code sets is taken back at the end.
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    return tmp_path / "cache"


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_name_tells_versions_and_devices_apart() -> None:
    assert NAME == "triton-3.6.0-torch-2.11.0+cu128-sm90-nvidia-h100-80gb-hbm3"
    assert "/" not in cache_name("3/../..", "2", (7, 5), "../Tesla T4")


def test_folder_is_the_users_alone(home: Path) -> None:
    mask = os.umask(0)
    try:
        found = use_cache(NAME)
    finally:
        os.umask(mask)
    assert found.path == home / "halfbyte" / NAME
    assert found.temporary_because == ""
    assert mode(found.path) == mode(found.path.parent) == 0o700
    assert os.environ[VARIABLE] == str(found.path)
    assert use_cache(NAME).path == found.path


@pytest.mark.parametrize("which", ["", NAME])
@pytest.mark.parametrize("bits", [0o720, 0o702])
def test_folder_that_others_may_write_to_is_not_used(home: Path, which: str, bits: int) -> None:
    folder = home / "halfbyte" / which
    folder.mkdir(parents=True)
    folder.chmod(bits)
    found = use_cache(NAME)
    assert not found.path.is_relative_to(home)
    assert mode(found.path) == 0o700
    assert "others may write to it" in found.temporary_because
    assert str(folder) in found.temporary_because
    assert os.environ[VARIABLE] == str(found.path)


def test_folder_of_another_user_is_not_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = os.getuid()
    (home / "halfbyte").mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    found = use_cache(NAME)
    assert not found.path.is_relative_to(home)
    assert "belongs to another user" in found.temporary_because


def test_a_file_in_the_way_does_not_end_the_run(home: Path) -> None:
    home.mkdir()
    (home / "halfbyte").write_text("")
    found = use_cache(NAME)
    assert found.path.is_dir()
    assert str(home / "halfbyte") in found.temporary_because


def test_users_own_choice_is_left_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine"))
    assert use_cache(NAME).path == tmp_path / "mine"
    assert not home.exists()


def test_triton_compiles_into_it_although_imported_before(home: Path) -> None:
    pytest.importorskip("triton")
    code = f"""
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from halfbyte.kernels.cache import use_cache
from halfbyte.kernels.rope import _rope
folder = use_cache({NAME!r}).path
names = dict(qkv="*fp16", cos="*fp32", sin="*fp32", position_ids="*i64", tokens="i32", stride="i32")
sizes = dict(HEADS=2, HALF=8, ROWS=128, BLOCK=8, ALIGNED=8, INVERSE=False)
signature = names | dict.fromkeys(sizes, "constexpr")
source = ASTSource(fn=_rope, signature=signature, constexprs=sizes)
triton.compile(source, target=GPUTarget("cuda", 75, 32))
assert list(folder.rglob("_rope.cubin")), list(folder.rglob("*"))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list((home / "halfbyte" / NAME).rglob("_rope.cubin"))
