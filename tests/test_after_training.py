"""The commands of docs/after-training.md, run as they stand there: ``make pages``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "after-training.md"
LANGUAGES = re.findall(
    r"^```(sh|python)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S
)
BLOCKS = [block for language, block in LANGUAGES if language == "sh"]
[PROGRAM] = [block for language, block in LANGUAGES if language == "python"]


# Answers of commands are compared with those of this process: in fp32, as in the other tests (see
# conftest.py). A processor that multiplies bf16 itself would give another word now and then.
ONE_PRECISION = """\
from dataclasses import replace

import halfbyte.plan.device as device

real = device.read_processor
device.read_processor = lambda: replace(real(), bf16_native=False)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path) -> Path:
    """Where all of the page's commands have been run in their order, what they said beside it."""
    if not os.environ.get("PAGES"):
        pytest.skip("five minutes: make pages")
    folder = tmp_path_factory.mktemp("after_training")
    begins = tmp_path_factory.mktemp("begins")  # each Python runs what it finds there first
    (begins / "sitecustomize.py").write_text(ONE_PRECISION)
    environment = {
        **os.environ,
        "PYTHONPATH": str(begins),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "100",
    }
    for number, block in enumerate(BLOCKS):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        (folder / f"said-{number}").write_text(done.stdout + done.stderr)
    return folder


def said(place: Path, command: str) -> str:
    """What the block that holds ``command`` has printed."""
    [number] = [n for n, block in enumerate(BLOCKS) if command in block]
    return (place / f"said-{number}").read_text()


def test_every_command_of_a_finished_adapter_is_on_the_page() -> None:
    commands = {
        line.split()[1]
        for block in BLOCKS
        for line in block.splitlines()
        if "halfbyte " in line and line.startswith("halfbyte")
    }
    assert commands >= {
        "demo",
        "evaluate",
        "compare",
        "merge",
        "export",
        "reduce",
        "combine",
        "push",
    }


def test_what_the_page_promises_is_there(place: Path) -> None:
    for path in (
        "run/evaluation/results.json",
        "run/evaluation/blind.jsonl",
        "merged/model.safetensors",
        "merged/merge.json",
        "lighthouse-q8_0.gguf",
        "lighthouse-q8_0.Modelfile",
        "lighthouse-lora.gguf",
        "smaller/adapter_model.safetensors",
        "both/adapter_model.safetensors",
    ):
        assert (place / path).stat().st_size > 0, path
    assert "Judged" in (place / "run" / "report.md").read_text()
    assert not [*place.rglob("*partial*")]


def test_the_program_on_the_page_says_what_the_chat_said(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    exec(compile(PROGRAM, PAGE.name, "exec"), {})
    answered = capsys.readouterr().out.strip()
    assert answered
    assert answered in said(place, "halfbyte chat")


def test_the_merged_model_is_the_trained_one(place: Path) -> None:
    """As transformers loads it, against the GGUF file as transformers loads that."""
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[1, 30, 400, 5000, 2, 77, 9, 1234]])
    with torch.no_grad():
        merged, exported = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)(ids).logits[0]
            for folder, how in [
                (place / "merged", {}),
                (place, {"gguf_file": "lighthouse-q8_0.gguf"}),
            ]
        )
    kl = (merged.log_softmax(-1).exp() * (merged.log_softmax(-1) - exported.log_softmax(-1))).sum(1)
    assert kl.mean() < 0.02
    assert json.loads((place / "merged" / "merge.json").read_text())


def test_what_would_be_sent_is_said(place: Path) -> None:
    told = said(place, "halfbyte push")
    assert "adapter_model.safetensors" in told
    assert "Nothing was sent" in told
    assert "events.jsonl" in told.partition("Not sent")[2]
