"""``halfbyte bench`` end to end on a CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from halfbyte.cli.app import app
from halfbyte.run import bench, bench_workload

FIGURES = {"ms_per_step", "tokens_per_s", "peak_bytes", "ready_s", "loss_first", "loss_last"}
TINY = replace(
    bench_workload.ON_CPU,
    shape={
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
    rows=10,
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The working directory, with the smallest of workloads in place of the usual ones."""
    monkeypatch.setattr(bench, "ON_CPU", TINY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["bench", *words])
    assert result.exit_code == code, result.output
    return result


def test_the_object_to_share(tiny: Path) -> None:
    """Every documented field, the same work for TRL, and the same model: the first loss agrees."""
    found = json.loads(invoke("--json", "--steps", "3", "--peers").stdout)

    assert found.keys() == {
        *("halfbyte", "date", "device", "packages", "precision", "ceilings", "workload", "tools"),
    }
    assert found["device"].keys() == {
        *("kind", "name", "capability", "memory_bytes", "cpu", "threads", "cuda", "driver"),
        *("platform", "python"),
    }
    assert found["device"]["kind"] == "cpu"
    assert found["packages"]["torch"] == torch.__version__
    assert found["ceilings"].keys() == {"copy_bytes_per_s", "product_flop_per_s", "product_size"}
    assert min(found["ceilings"].values()) > 0

    work = found["workload"]
    assert work["steps"] == 3
    # 10 rows of 80 to 160 tokens in batches of 4, 4 and 2: after 2 steps of warm-up come one of
    # 2 rows and the next epoch's first two.
    assert 160 + 2 * 320 <= 3 * work["tokens_per_step"] <= 320 + 2 * 640
    assert 3 * work["labels_per_step"] == pytest.approx(3 * work["tokens_per_step"] - 10)
    h, i, kv, v, layers, r = 64, 128, 32, 300, 2, 16
    base = 2 * v * h + h + layers * (2 * h * h + 2 * h * kv + 3 * h * i + 2 * h)
    adapter = layers * r * (2 * (h + h) + 2 * (h + kv))
    assert work["parameters"] == base + adapter

    ours, theirs = found["tools"]["halfbyte"], found["tools"]["trl"]
    assert ours.keys() == FIGURES
    assert theirs.keys() == FIGURES, theirs
    assert ours["loss_first"] == pytest.approx(theirs["loss_first"], rel=1e-4)
    for tool in (ours, theirs):
        seconds = 3 * work["tokens_per_step"] / tool["tokens_per_s"]
        assert 0 < tool["ms_per_step"] / 1e3 < seconds
    assert list(tiny.iterdir()) == []  # nothing is kept


def test_table_and_file(tiny: Path) -> None:
    shown = invoke("--out", "figures.json", "--steps", "2").stdout
    found = json.loads((tiny / "figures.json").read_text())
    assert found["workload"]["steps"] == 2
    assert found["tools"].keys() == {"halfbyte"}
    for words in ("device", "/s read and written", "FLOP/s in ", "ms a step", "figures.json"):
        assert words in shown


def test_peers_that_are_missing_are_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_trl(name: str) -> object:
        return None if name == "trl" else object()

    monkeypatch.setattr(bench, "find_spec", without_trl)
    shown = invoke("--steps", "1", "--peers").stdout
    assert "not installed: trl (pip install" in shown
    assert "ms a step" in shown


def test_a_peer_that_fails_says_why(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tiny))
    (tiny / "trl.py").write_text("raise RuntimeError('this trl is broken')")
    found = json.loads(invoke("--json", "--steps", "1", "--peers").stdout)
    assert found["tools"]["trl"] == {"error": "TRL failed: RuntimeError: this trl is broken"}
    assert found["tools"]["halfbyte"].keys() == FIGURES


@pytest.mark.parametrize(
    ("out", "why"), [("no/such/file.json", "there is no folder no/such"), (".", "it is a folder")]
)
def test_a_wrong_file_is_said_before_anything_is_measured(tiny: Path, out: str, why: str) -> None:
    result = invoke("--out", out, code=2)
    assert result.stderr == (
        f"halfbyte: the figures cannot be written to {out} ({why}); choose another --out.\n"
    )


def test_no_room_for_the_model(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bench, "make_workload", full)
    result = invoke(code=2)
    assert "(No space left on device); set TMPDIR" in result.stderr.splitlines()[-1]
