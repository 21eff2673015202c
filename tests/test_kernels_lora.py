"""The adapters' thin products in Triton against fp64 and against PyTorch's own products.

On a machine without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from triton_interpreter import DEVICE

# isort: split

from halfbyte.kernels import lora_group as kernels
from halfbyte.kernels import lora_group_plain as plain
from halfbyte.kernels.dropout import (
    apply_dropout,
    apply_dropout_reference,
    dropout_key,
    dropout_keys,
    keep_mask,
)
from halfbyte.kernels.lora_group import LoraGroup, LoraPart, make_fold, part_table

# The interpreter truncates to bf16 where a GPU rounds, and one 16-bit type shows what both would.
DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if DEVICE == "cuda" else [])]
# Half a unit in the last place, as a share of the value.
BELOW = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
FP32 = 2.0**-19  # of the sum of a sum's absolute terms: what summing in fp32 may be off by
POISON = 77.0


@dataclass(frozen=True)
class Shape:
    tokens: int
    columns: int
    r: int
    rows: tuple[int, ...]  # of each layer
    extra: int
    p: float = 0.3

    def __str__(self) -> str:
        return f"{self.tokens}x{self.columns}-r{self.r}-{'+'.join(map(str, self.rows))}-p{self.p}"


# Sums of one block and of several, rows and columns that end inside one, ranks below the 16 that a
# product takes at least, with and without columns that only fill up.
SHAPES = [
    Shape(1, 96, 4, (40, 8, 8), 16),
    Shape(63, 200, 16, (72,), 16),
    Shape(137, 96, 4, (40, 8, 8), 128),
    Shape(70, 300, 24, (66, 40), 48),
    Shape(700, 96, 16, (48,), 16, p=0.05),
    Shape(63, 320, 64, (70, 33, 1), 256, p=0.0),
    Shape(65, 130, 64, (64, 64), 128, p=0.5),
]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def strided(value: Tensor, gap: int = 5) -> tuple[Tensor, Tensor]:
    """(view with the values, what it lies in): what lies around it has to stay."""
    whole = torch.full(
        (len(value) + 2, value.shape[1] + gap), POISON, dtype=value.dtype, device=DEVICE
    )
    view = whole[1:-1, : value.shape[1]]
    view.copy_(value)
    return view, whole


def untouched(whole: Tensor, columns: int) -> bool:
    around = whole[:, columns:], whole[[0, -1]]
    return all(bool((part == POISON).all()) for part in around)


def group_of(shape: Shape, c: torch.dtype, seed: int = 0) -> LoraGroup:
    """Adapters that lie apart in the flat parameters, and whose masks are not the first ones."""
    parts, at, row = [], 3, 0
    for number, rows in enumerate(shape.rows):
        a, b = at, at + shape.r * shape.columns + 7
        parts.append(LoraPart(a, b, row, rows, 5 - 2 * number))
        at, row = b + rows * shape.r + 1, row + rows
    values = randn(at, seed=seed)
    return LoraGroup(
        parts=tuple(parts),
        table=part_table(parts, torch.device(DEVICE)),
        values=values,
        shadow=values.to(c),
        grad=torch.full_like(values, POISON),
        columns=shape.columns,
        extra=shape.extra,
        r=shape.r,
        scale=1.7,
        p=shape.p,
    )


def keys_of(shape: Shape) -> Tensor | None:
    if shape.p == 0.0:
        return None
    found = [dropout_key(11, 4, 2, module) for module in range(7)]
    return torch.tensor(found, dtype=torch.int32, device=DEVICE)


def mask_of(shape: Shape, keys: Tensor | None, part: LoraPart) -> Tensor:
    """0 or 1 / (1 - p), fp64 [T, K]."""
    size = shape.tokens, shape.columns
    if keys is None:
        return torch.ones(size, dtype=torch.float64, device=DEVICE)
    key = tuple(keys[part.module].tolist())
    return keep_mask(size, shape.p, key, torch.device(DEVICE)).double() / (1.0 - shape.p)


def columns_of(shape: Shape, number: int) -> slice:
    first = shape.columns + number * shape.r
    return slice(first, first + shape.r)


def assert_near(found: Tensor, exact: Tensor, terms: Tensor) -> None:
    """``found`` is ``exact`` (fp64) rounded once, but for summing ``terms`` in fp32."""
    bound = BELOW[found.dtype] * exact.abs() + FP32 * terms + 2 * torch.finfo(found.dtype).tiny
    if found.dtype == torch.float16:
        bound = bound + 2.0**-25  # half the smallest step there is
    error = (found.double() - exact).abs()
    assert (error <= bound).all(), f"{(error / bound).max():.3g} times the bound"


@pytest.fixture(params=[512, 1], ids=["split", "whole"])
def splitting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many programs are wanted; with one, no sum is divided among several."""
    monkeypatch.setattr(kernels, "_ENOUGH_PROGRAMS", request.param)
    return int(request.param)


# PyTorch's own products round several times in 16 bits: fp32 is what tells whether they are right.
both = pytest.mark.parametrize(
    ("file", "c"),
    [
        *(pytest.param(kernels, c, id=f"kernel-{c}") for c in DTYPES),
        pytest.param(plain, torch.float32, id="plain"),
    ],
)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@both
@shapes
@pytest.mark.usefixtures("splitting")
def test_lora_down(shape: Shape, c: torch.dtype, file: object) -> None:
    group, keys = group_of(shape, c), keys_of(shape)
    value = torch.full((shape.tokens, shape.columns + shape.extra), torch.nan, device=DEVICE)
    value[:, : shape.columns] = randn(shape.tokens, shape.columns, seed=1)
    found = []
    for _ in range(2):
        x, whole = strided(value.to(c))
        file.lora_down(x, group, keys)  # type: ignore[attr-defined]
        assert untouched(whole, x.shape[1])
        found.append(x)
    assert torch.equal(*found)
    x = found[0]
    assert torch.equal(x[:, : shape.columns], value[:, : shape.columns].to(c))
    assert (x[:, shape.columns + len(group.parts) * shape.r :] == 0.0).all()
    for number, part in enumerate(group.parts):
        a = group.views(group.shadow, part)[0].double()
        dropped = x[:, : shape.columns].double() * mask_of(shape, keys, part)
        u = x[:, columns_of(shape, number)]
        assert_near(u, dropped @ a.t(), dropped.abs() @ a.abs().t())


@both
@shapes
def test_lora_grad_input(shape: Shape, c: torch.dtype, file: object) -> None:
    group, keys = group_of(shape, c), keys_of(shape)
    value = randn(shape.tokens, shape.columns + shape.extra, seed=2)
    value[:, shape.columns + len(group.parts) * shape.r :] = torch.nan  # nobody reads it
    before = value.to(c)
    found = []
    for _ in range(2):
        d_x, whole = strided(before)
        file.lora_grad_input(d_x, group, keys)  # type: ignore[attr-defined]
        assert untouched(whole, d_x.shape[1])
        found.append(d_x[:, : shape.columns].clone())
        assert torch.equal(
            d_x[:, shape.columns :].nan_to_num(), before[:, shape.columns :].nan_to_num()
        )
    assert torch.equal(*found)
    exact = before[:, : shape.columns].double()
    terms = exact.abs()
    for number, part in enumerate(group.parts):
        a = group.views(group.shadow, part)[0].double()
        g = before[:, columns_of(shape, number)].double()
        mask = mask_of(shape, keys, part)
        exact, terms = exact + (g @ a) * mask, terms + (g.abs() @ a.abs()) * mask
    assert_near(found[0], exact, terms)


@both
@shapes
@pytest.mark.usefixtures("splitting")
def test_lora_grads(shape: Shape, c: torch.dtype, file: object) -> None:
    keys = keys_of(shape)
    wide = shape.columns + shape.extra
    x, d_x, d_y = (
        strided(randn(shape.tokens, width, seed=seed).to(c), gap)
        for seed, (width, gap) in enumerate([(wide, 5), (wide, 9), (sum(shape.rows), 3)], start=3)
    )
    grads = []
    for _ in range(2):
        group = group_of(shape, c)
        file.lora_grads(x[0], d_x[0], d_y[0], group, keys)  # type: ignore[attr-defined]
        grads.append(group.grad)
    assert torch.equal(*grads)
    written = torch.zeros_like(grads[0], dtype=torch.bool)
    for number, part in enumerate(group.parts):
        grad_a, grad_b = group.views(grads[0], part)
        for view in group.views(written, part):
            view.fill_(True)
        columns = columns_of(shape, number)
        dropped = x[0][:, : shape.columns].double() * mask_of(shape, keys, part)
        g = d_x[0][:, columns].double()
        assert_near(grad_a, POISON + g.t() @ dropped, POISON + g.abs().t() @ dropped.abs())
        rows = slice(part.first_row, part.first_row + part.rows)
        dy, u = d_y[0][:, rows].double(), x[0][:, columns].double()
        exact = POISON + group.scale * dy.t() @ u
        assert_near(grad_b, exact, POISON + group.scale * dy.abs().t() @ u.abs())
    # What lies between the parameters is nobody's.
    assert (grads[0][~written] == POISON).all()


def test_sums_are_split_in_one_case_and_not_in_the_other(splitting: int) -> None:
    found = [kernels._splits(programs, steps) for programs, steps in ((3, 4), (9, 16), (500, 16))]
    assert found == ([4, 16, 1] if splitting == 512 else [1, 1, 1])


@both
@pytest.mark.parametrize("r", [4, 16, 24, 64])
def test_fold_b(r: int, c: torch.dtype, file: object) -> None:
    """Of layers of different sizes and strides in one launch."""
    weights, entries = [], []
    made = Shape(1, 96, r, (40, 8, 7), 3 * r + 8), Shape(1, 130, r, (70,), r)
    flat = [group_of(shape, c, seed=number) for number, shape in enumerate(made)]
    values = torch.cat([group.values for group in flat])
    for number, (shape, group) in enumerate(zip(made, flat, strict=True)):
        shift = number * len(flat[0].values)
        parts = tuple(replace(p, a=p.a + shift, b=p.b + shift) for p in group.parts)
        group = replace(group, parts=parts, values=values)
        weight, whole = strided(
            randn(sum(shape.rows), shape.columns + shape.extra, seed=8).to(c), 3 + number
        )
        weights.append((weight, whole, weight.clone()))
        entries.append((group, weight))
    file.fold_b(make_fold(entries))  # type: ignore[attr-defined]
    for (group, weight), (_, whole, expected) in zip(entries, weights, strict=True):
        for number, part in enumerate(group.parts):
            b = group.views(group.values, part)[1]
            first = group.columns + number * r
            rows = slice(part.first_row, part.first_row + part.rows)
            expected[rows, first : first + r] = (b * group.scale).to(c)
        # B of one layer beside the others' zeros, the weight and what fills it up: all else stays.
        assert torch.equal(weight, expected)
        assert untouched(whole, weight.shape[1])


@pytest.mark.parametrize("modules", [1, 7, 154, 700])
def test_dropout_keys_are_the_hosts(modules: int) -> None:
    for seed in (0, 1, 42, 2**31 - 1):
        for step, micro_batch in ((1, 0), (2, 0), (1, 1), (375, 3), (2**31 + 5, 0), (2**33 + 1, 9)):
            keys = torch.full((modules + 1, 2), 77, dtype=torch.int32, device=DEVICE)
            position = torch.tensor([step, micro_batch], device=DEVICE)
            dropout_keys(seed, position, keys[:modules])
            expected = [dropout_key(seed, step, micro_batch, m) for m in range(modules)]
            assert keys[:modules].tolist() == [list(key) for key in expected]
            assert keys[modules].tolist() == [77, 77]


@pytest.mark.parametrize("c", DTYPES, ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("size", [(1, 96), (63, 130), (7, 1100)], ids=str)
def test_apply_dropout(size: tuple[int, int], accumulate: bool, c: torch.dtype) -> None:
    key = torch.tensor(dropout_key(3, 2, 1, 0), dtype=torch.int32, device=DEVICE)
    x, _ = strided(randn(*size, seed=1).to(c))
    before = randn(*size, seed=2).to(c)
    out, whole = strided(before)
    apply_dropout(x, key, 0.25, out, accumulate=accumulate)
    assert untouched(whole, size[1])
    mask = keep_mask(size, 0.25, tuple(key.tolist()), torch.device(DEVICE)).double()
    exact = x.double() * mask / 0.75 + (before.double() if accumulate else 0.0)
    assert_near(out, exact, x.double().abs() + before.double().abs())
    assert accumulate or torch.equal(out == 0.0, mask == 0.0)
    reference = before.clone()
    apply_dropout_reference(x, key, 0.25, reference, accumulate=accumulate)
    # Which rounds the dropped value and then the sum.
    bound = 4 * BELOW[c] * (x.double().abs() + before.double().abs())
    assert ((out.double() - reference.double()).abs() <= bound).all()


def test_they_compile_for_the_cards_that_run_them(tmp_path: Path) -> None:
    """Products from Ampere on, in a consumer card's shared memory; all else for Turing as well."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_lora.py"))],
        env=env | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    print(*(f"{k['kernel']} sm_{k['capability']}: {k['shared']} bytes" for k in found), sep="\n")
    launched = ("lora_down", "sum_down", "lora_grad_input", "lora_grads", "sum_grads")
    products = {f"{name}_kernel" for name in launched}
    others = {"fold_b_kernel", "_dropout_keys", "_apply_dropout"}
    assert {(k["kernel"], k["capability"]) for k in found} == {
        *((name, capability) for name in products for capability in (80, 90)),
        *((name, capability) for name in others for capability in (75, 80, 90)),
    }
    for kernel in found:
        assert kernel["bytes"] > 0
        assert kernel["shared"] <= (65536 if kernel["kernel"] in others else 99 * 1024)
        multiplies = kernel["kernel"] in products and not kernel["kernel"].startswith("sum")
        assert (kernel["products"] > 0) == multiplies
