"""halfbyte trains what TRL, PEFT and bitsandbytes train, and the test would notice if not.

Tiny random models are trained twice on a CPU in fp32 from the same weights in NF4, the same
adapter and the same rows: by the usual stack with its own tokenizing, padding, loss, optimizer
and schedule, and by halfbyte. Then eight mutants of halfbyte are trained, and each has to fail.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("bitsandbytes")

from oracle.case import Case, Family, Trace, random_adapter, save_model
from oracle.compare import differences, unsound
from oracle.mutants import MUTANTS
from oracle.ours import load, train_ours
from oracle.reference import train_reference

FAMILIES: list[Family] = ["llama", "qwen3", "gemma3"]
CASES = {family: Case(family) for family in FAMILIES} | {
    "answers": Case(loss_on="answer"),
    "accumulation": Case(loss_on="answer", batch_size=2, gradient_accumulation=2),
    # From this rank on every matrix has the 4,096 elements that 8-bit state begins at.
    "8bit": Case("qwen3", optimizer="adamw_8bit", double_quant=False, r=64, lora_alpha=128),
}


class Workshop:
    """Models and reference runs, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reference = cache(self._reference)

    def model(self, family: Family) -> Path:
        folder = self.folder / family
        if not folder.exists():
            save_model(folder, family)
        return folder

    def adapter(self, case: Case) -> dict[str, torch.Tensor]:
        parameters = load(self.model(case.family), case).lora_parameters()
        return random_adapter({name: p.shape for name, p in parameters.items()})

    def _reference(self, case: Case) -> Trace:
        return train_reference(
            self.model(case.family), case, self.adapter(case), self.folder / "trl"
        )

    def ours(self, case: Case) -> Trace:
        return train_ours(self.model(case.family), case, self.adapter(case))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at this size a second one only waits
    quiet = [logging.getLogger(name) for name in ("transformers", "trl", "peft")]
    levels = [logger.level for logger in quiet]
    for logger in quiet:
        logger.setLevel(logging.ERROR)
    yield Workshop(tmp_path_factory.mktemp("oracle"))
    torch.set_num_threads(threads)
    for logger, level in zip(quiet, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.parametrize("name", CASES)
def test_the_same_training(workshop: Workshop, name: str) -> None:
    case = CASES[name]
    reference, ours = workshop.reference(case), workshop.ours(case)
    assert unsound(reference) == []
    assert ours.tokens == reference.tokens
    # The first token of a row is never predicted, whatever its label says.
    assert [row[1:] for row in ours.labels] == [row[1:] for row in reference.labels]
    assert differences(reference, ours) == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_fails(
    workshop: Workshop, mutant: str, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[family]
    reference = workshop.reference(case)
    MUTANTS[mutant](monkeypatch)
    found = differences(reference, workshop.ours(case))
    print(f"{mutant}, {family}: {len(found)} reasons, the first: {found[:1]}")
    assert found != []
