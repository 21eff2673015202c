"""``halfbyte reduce`` against the singular values of the whole product, in fp64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_case import peft_adapter, peft_logits, refusal
from command_line import halfbyte
from family_case import FAMILIES, save_family
from halfbyte.export.reduce import reduced
from halfbyte.model.adapter_files import read_adapter
from halfbyte.model.saved_scale import saved_scales

IDS = torch.randint(3, 290, (40,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(FAMILIES["llama 2"].make, tiny_model, tmp_path_factory.mktemp("reduce"))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 3),
    st.one_of(st.integers(1, 14), st.floats(0.05, 1.0)),
    st.integers(0, 1000),
)
def test_no_matrix_of_that_rank_is_nearer(
    r: int, rows: int, columns: int, alike: int, asked: int | float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(r, columns, generator=draw), torch.randn(rows, r, generator=draw)
    a[: min(alike, r)] = a[0].clone()  # so that some ranks are idle
    wanted: dict[str, Any] = {"rank": asked} if isinstance(asked, int) else {"energy": asked}
    found = reduced(a, b, 0.5, **wanted)
    product = 0.5 * b.double() @ a.double()
    u, values, vh = torch.linalg.svd(product, full_matrices=False)
    squares = values.square()
    if isinstance(asked, int):
        assert found.rank <= asked
    else:
        assert float(squares[: found.rank].sum()) >= asked * float(squares.sum()) * (1 - 1e-9)
        before = float(squares[: found.rank - 1].sum())
        assert found.rank == 1 or before < asked * float(squares.sum())
    k = found.rank
    ours = found.pair[1].double() @ found.pair[0].double()
    best = (u[:, :k] * values[:k]) @ vh[:k]
    size = float(product.norm())
    least = float((product - best).norm())
    assert float((product - ours).norm()) <= least + 1e-6 * size
    assert found.error == pytest.approx(least / size, abs=1e-7)
    assert found.size == pytest.approx(size, rel=1e-9)


def test_an_adapter_that_does_nothing_has_rank_one() -> None:
    found = reduced(torch.randn(4, 9), torch.zeros(7, 4), 2.0, energy=0.5)
    assert found.rank == 1
    assert found.error == 0.0
    assert not (found.pair[1] @ found.pair[0]).any()


PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 20}}


@pytest.mark.parametrize(
    "settings",
    [
        {**PATTERNS, "use_rslora": True, "modules_to_save": ["lm_head"]},
        {**PATTERNS, "target_modules": ["q_proj", "up_proj", "lm_head"]},
    ],
    ids=["a head trained whole", "low ranks in the head"],
)
def test_no_rank_less_than_there_is_changes_nothing(
    settings: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    adapter = peft_adapter(base, tmp_path / "adapter", **settings)
    out = tmp_path / "out"
    said = halfbyte("reduce", adapter, "--rank", "64", "--out", out).stdout
    assert "rank: 2 to 4 → 2 to 4, " in said
    expected = peft_logits(base, adapter, IDS)
    assert float((peft_logits(base, out, IDS) - expected).abs().max()) < 1e-4 * expected.std()


@pytest.mark.parametrize("words", [("--rank", "2"), ("--energy", "0.8")])
def test_what_is_lost_is_said(words: tuple[str, str], base: Path, tmp_path: Path) -> None:
    adapter, out = peft_adapter(base, tmp_path / "adapter", r=6), tmp_path / "out"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"revision": "v1"}))
    said = halfbyte("reduce", adapter, *words, "--out", out).stdout
    before, after = read_adapter(adapter), read_adapter(out)
    s, t = saved_scales(before), saved_scales(after)
    errors = {}
    for name, (a, b) in before.layers.items():
        product = s[name] * b.double() @ a.double()
        ours = t[name] * after.layers[name][1].double() @ after.layers[name][0].double()
        errors[name] = float((product - ours).norm() / product.norm())
        ranks = len(after.layers[name][0])
        assert ranks == 2 if words[0] == "--rank" else ranks < 6
    worst = max(errors, key=lambda n: errors[n])
    record = json.loads((out / "adapter_origin.json").read_text())
    assert record["errors"]["layer"] == worst
    assert record["errors"]["largest"] == pytest.approx(errors[worst], rel=1e-4)
    assert record["errors"]["mean"] == pytest.approx(sum(errors.values()) / len(errors), rel=1e-4)
    assert {n: one["error"] for n, one in record["layers"].items()} == pytest.approx(
        errors, rel=1e-3, abs=1e-6
    )
    assert f"{errors[worst]:.2%} at most: {worst}" in said
    card = (out / "README.md").read_text()
    assert f"{errors[worst]:.2%} at most" in card
    assert json.loads((out / "adapter_config.json").read_text())["revision"] == "v1"
    peft_logits(base, out, IDS)


def test_what_cannot_be_reduced_is_one_sentence(base: Path, tmp_path: Path) -> None:
    few = {"target_modules": ["q_proj"]}
    dora = peft_adapter(base, tmp_path / "dora", use_dora=True, **few)
    plain = peft_adapter(base, tmp_path / "plain", **few)
    out = ("--out", tmp_path / "out")
    for words, says in (
        ((dora, "--rank", "2"), "is a DoRA adapter"),
        ((plain,), "either --rank R or --energy X"),
        ((plain, "--rank", "2", "--energy", "0.9"), "either --rank R or --energy X"),
        ((plain, "--energy", "99"), "--energy 99"),
        ((base, "--rank", "2"), "neither a run folder nor an adapter"),
    ):
        assert says in refusal("reduce", *words, *out)
    assert not (tmp_path / "out").exists()
