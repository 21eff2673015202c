"""Files made wrong by chance: a result or one sentence, always; ``make fuzz`` tries more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fuzz_kinds import Place, ending, make_place, one_input
from fuzz_seeds import small_gguf


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_rows: Path
) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("fuzz")
    before, here = dict(os.environ), Path.cwd()
    import halfbyte.data.cleaning.language as language

    kept = language._identifier
    yield make_place(folder, tiny_model, tiny_rows, small_gguf(folder / "small.gguf"))
    os.chdir(here)
    os.environ.clear()
    os.environ.update(before)
    language._identifier = kept


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("recipe", 50),
        ("rows", 80),
        ("record", 25),
        ("model", 30),
        ("GGUF", 8),
        ("adapter", 6),
        ("checkpoint", 3),
    ],
)
def test_a_result_or_a_sentence(place: Place, kind: str, count: int) -> None:
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32))
    def tried(seed: int) -> None:
        fault = one_input(place, kind, Random(seed))
        assert fault is None, f"seed {seed}: {fault.where}\n{fault.detail}"

    tried()


def test_what_is_whole_is_no_fault(place: Place) -> None:
    """The files as they are; and a command that is wrong, which is told."""
    for words in (["data", "recipe.yaml"], ["report", "run"], ["chat", "run"]):
        assert ending(words) is None
    assert ending(["train", "nowhere.yaml"]) is None
    assert ending(["train", "--no-such-option"]) is not None
