"""On a GPU, fused layers train what PEFT trains in fp64, and the test would notice if not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from halfbyte.kernels.choice import ALL, ELEMENTWISE, PLAIN
from halfbyte.run.determinism import deterministic
from oracle.case import Case, Trace, random_adapter, save_model
from oracle.compare import differences, unsound
from oracle.double import train_double
from oracle.fused import Way, train_fused
from oracle.fused_mutants import FUSED_MUTANTS
from oracle.ours import load

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
# What rounding 16-bit products does to the loss of the first step, before it has fallen.
ROUNDING = 1e-3
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "initializer_range": 0.1}
# A rate at which rounding is not blown up from step to step: at 1e-2 AdamW's first steps, which are
# the sign of the gradient, carry even fp32 away from fp64.
ALL_TOKENS = Case(learning_rate=2e-3)
ANSWERS = replace(ALL_TOKENS, loss_on="answer", double_quant=False)
ACCUMULATED = replace(ANSWERS, batch_size=2, gradient_accumulation=2)
CASES: dict[str, tuple[Case, Way]] = {
    "eager, kept": (ALL_TOKENS, Way(BF16, ALL)),
    "eager, from NF4, made again": (ANSWERS, Way(BF16, ALL, keep=0, recompute=2)),
    "captured, kept": (ANSWERS, Way(BF16, ALL, captured=True)),
    "captured, one kept, one made again": (ALL_TOKENS, Way(BF16, ALL, 1, 1, captured=True)),
    "captured, accumulated": (ACCUMULATED, Way(BF16, ALL, captured=True)),
    "captured, biases": (replace(ANSWERS, family="qwen2"), Way(BF16, ALL, captured=True)),
    "captured, window": (replace(ALL_TOKENS, family="mistral"), Way(BF16, ALL, captured=True)),
    "fp16, scaled": (ALL_TOKENS, Way(FP16, ALL, captured=True)),
    "as on a T4": (ANSWERS, Way(FP16, ELEMENTWISE, 0, 2, captured=True)),
    "without Triton": (ALL_TOKENS, Way(BF16, PLAIN)),
    "fp32": (ALL_TOKENS, Way(torch.float32, ALL)),
}
# Dropout is off here: its masks have tests of their own.
MUTANTS = [
    name
    for name in FUSED_MUTANTS
    if name
    not in ("mask_of_another_module", "other_mask_in_the_gradient", "kept_elements_not_scaled")
]


class References:
    """Models and runs in fp64, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trace = cache(self._trace)

    def model(self, case: Case) -> Path:
        folder = self.folder / case.family
        if not folder.exists():
            save_model(folder, case.family, **SIZES)
        return folder

    def adapter(self, case: Case) -> dict[str, torch.Tensor]:
        parameters = load(self.model(case), case).lora_parameters()
        return random_adapter({name: p.shape for name, p in parameters.items()})

    def _trace(self, case: Case) -> Trace:
        return train_double(self.model(case), case, self.adapter(case))

    def differences(self, case: Case, way: Way) -> list[str]:
        with torch.cuda.stream(torch.cuda.Stream()), deterministic(True):
            ours = train_fused(
                self.model(case), case, self.adapter(case), replace(way, device="cuda")
            )
        return differences(self.trace(case), ours, rounding=ROUNDING)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Iterator[References]:
    return References(tmp_path_factory.mktemp("oracle"))


@pytest.mark.parametrize("name", CASES)
def test_the_same_training(references: References, name: str) -> None:
    case, way = CASES[name]
    assert unsound(references.trace(case)) == []
    assert references.differences(case, way) == []


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_fails(
    references: References, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(ALL_TOKENS, steps=6)
    if mutant == "bias_forgotten":
        case = replace(case, family="qwen2")
    if mutant == "window_forgotten":
        case = replace(case, family="mistral")
    keep = 0 if mutant.startswith("scratch") else None
    assert references.differences(case, Way(BF16, ALL, keep)) == []
    kernels = FUSED_MUTANTS[mutant](monkeypatch, ALL)
    found = references.differences(case, Way(BF16, kernels, keep))
    print(f"{mutant}: {len(found)} reasons, the first: {found[:1]}")
    assert found != []
