"""Folders for MLX and vLLM: written and loaded by their own packages, and what becomes of them
where those are not there or fail.

The packages are found in a Python that HALFBYTE_MLX_PYTHON or HALFBYTE_COMPRESSOR_PYTHON names.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapter_case import in_nf4, peft_logits, refusal, train_run
from command_line import halfbyte
from halfbyte.data.batch import TokenizedRow
from halfbyte.errors import ModelError
from halfbyte.export.agreement import compare_logits
from halfbyte.export.elsewhere.calibration import calibration_ids
from halfbyte.export.elsewhere.check import check_folder
from halfbyte.export.elsewhere.groups import choose_group
from halfbyte.export.elsewhere.types import TARGETS
from halfbyte.export.elsewhere.workers import Loaded, Workshop
from halfbyte.export.gguf.check import Row
from halfbyte.finished.found import find_adapter, open_base
from halfbyte.finished.rows import held_out_rows
from halfbyte.generate.prompt import prompt_ids
from halfbyte.model.skeleton import build_skeleton
from halfbyte.model.source import open_model
from halfbyte.plan.device import find_device
from halfbyte.recipe.schema import ModelRecipe

VARIABLES = sorted({target.variable for target in TARGETS.values()})


@pytest.fixture(scope="module")
def run(wide_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere") / "my run"
    return train_run(folder, wide_model, tiny_rows)


@pytest.fixture(scope="module")
def wide_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 64 and 192 weights: whole groups of 64, and none of 128."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide") / "wide-llama"
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    settings = json.loads((tiny_model / "config.json").read_text())
    settings |= {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}
    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    torch.random.set_rng_state(state)
    return folder


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package, whatever this machine has."""
    from halfbyte.export.elsewhere import workers

    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(workers, "find_spec", lambda name: None)


def python_of(target: str) -> str:
    variable = TARGETS[target].variable
    named = os.environ.get(variable)
    if not named:
        pytest.skip(f"no {TARGETS[target].package}: set {variable} to a Python that has it")
    return named


# How far a folder is from the model that was trained, in nats: random weights lose much.
CASES = [
    ("mlx", "bf16", 2e-3),
    ("mlx", "f16", 1e-3),
    ("mlx", "q8", 1e-2),
    ("mlx", "q4", 0.5),
    ("gptq", "w4a16", 0.5),
    ("gptq", "w8a16", 1e-2),
    ("awq", "w4a16", 0.5),
]


@pytest.mark.parametrize(("target", "type", "most"), CASES)
def test_a_run(run: Path, target: str, type: str, most: float, tmp_path: Path) -> None:
    python = python_of(target)
    out = tmp_path / "out"
    done = halfbyte("export", run, "--to", target, "--type", type, "--out", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    record = json.loads((out / "halfbyte.json").read_text())
    assert record["rows_in_other_tokens"] == 0
    assert record["compared_on"]["rows"] == 5
    assert record["calibrated_with_rows"] == (0 if target == "mlx" else 19)
    if type not in ("bf16", "f16"):
        assert record["group"] == 64
        assert record["matrices"]["kept_in_16_bits"] == []
        assert ("not 128" in done.stdout) == (target != "mlx")
    # Beside PEFT on the 4-bit weights that trained.
    found = find_adapter(run)
    source = open_base(found)
    held_out = held_out_rows(found, source)
    ids = [torch.from_numpy(piece.input_ids.astype(np.int64)) for piece in held_out.pieces]
    base = Path(found.base.name)
    theirs = [peft_logits(in_nf4(base), found.adapter, row) for row in ids]
    texts = [held_out.template.prompt(row) for row in held_out.rows]
    loaded = load(python, target, out, texts, [row.tolist() for row in ids], tmp_path)
    assert loaded["tokens"] == [prompt_ids(source.tokenizer, text) for text in texts]
    assert loaded["prompt"] == held_out.template.prompt(held_out.rows[0])
    assert loaded["stop"] == [source.tokenizer.eos_token_id]
    apart = compare_logits(loaded["logits"], theirs)
    assert apart.kl < most
    if type in ("q4", "w4a16"):
        assert apart.kl > 1e-5


# What somebody would write who has the folder and the package, and no halfbyte.
MLX = """
from mlx_lm import load
import mlx.core as mx
model, tokenizer = load(job["folder"])
logits = [np.array(model(mx.array(row)[None])[0].astype(mx.float32)) for row in job["rows"]]
tokens = [tokenizer.encode(text) for text in job["texts"]]
stop = sorted(tokenizer.eos_token_ids)
"""
TRANSFORMERS = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(job["folder"])
tokenizer = AutoTokenizer.from_pretrained(job["folder"])
with torch.no_grad():
    logits = [model(torch.tensor([row])).logits[0].float().numpy() for row in job["rows"]]
tokens = [tokenizer(text).input_ids for text in job["texts"]]
stop = [model.generation_config.eos_token_id]
quantized = json.load(open(job["folder"] + "/config.json"))["quantization_config"]
assert quantized["quant_method"] == "compressed-tensors", quantized
assert quantized["format"] == "pack-quantized", quantized
"""
AROUND = """
import json, sys
import numpy as np
job = json.load(open(sys.argv[1]))
{}
asked = [{{"role": "user", "content": job["question"]}}]
prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
np.savez(job["logits"], **{{str(at): value for at, value in enumerate(logits)}})
json.dump({{"tokens": tokens, "prompt": prompt, "stop": stop}}, open(job["answer"], "w"))
"""


def load(
    python: str, target: str, folder: Path, texts: list[str], rows: list[list[int]], place: Path
) -> dict[str, Any]:
    job = place / "job.json"
    answer, logits = place / "answer.json", place / "logits.npz"
    question = texts[0].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    work = {"folder": str(folder), "texts": texts, "rows": rows, "question": question}
    job.write_text(json.dumps(work | {"answer": str(answer), "logits": str(logits)}))
    script = AROUND.format(MLX if target == "mlx" else TRANSFORMERS)
    done = subprocess.run([python, "-I", "-c", script, job], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(answer.read_text())
    with np.load(logits) as values:
        found["logits"] = [torch.from_numpy(values[str(at)]) for at in range(len(rows))]
    return found


def test_a_whole_model_for_mlx(wide_model: Path, tmp_path: Path) -> None:
    python_of("mlx")
    done = halfbyte("export", wide_model, "--to", "mlx", "--type", "q8", "--out", tmp_path / "out")
    assert "texts of halfbyte's own" in done.stdout
    assert "from the adapter" not in done.stdout


def test_a_model_that_the_package_does_not_know(run: Path, tmp_path: Path) -> None:
    """Rows that fit no group of mlx-lm's at all stay, and an unknown architecture is refused."""
    python_of("mlx")
    model = tmp_path / "model"
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(find_adapter(run).adapter)
    tokenizer.save_pretrained(model)
    config = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=300, intermediate_size=96, **config)
    ).save_pretrained(model)
    settings = json.loads((model / "config.json").read_text())
    settings["model_type"] = "gpt_neox"
    said = refusal("export", model, "--to", "mlx", "--out", tmp_path / "out")
    assert "mlx-lm" in said


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize("target", TARGETS)
def test_the_package_is_not_here(run: Path, target: str, tmp_path: Path) -> None:
    said = refusal("export", run, "--to", target, "--out", tmp_path / "out")
    assert f"halfbyte[{TARGETS[target].extra}]" in said
    assert TARGETS[target].variable in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "mlx", "--type", "q44"], "did you mean q4?"),
        (["--to", "awq", "--type", "w8a16"], "It is one of w4a16"),
        (["--to", "gptq", "--type", "q4_0"], "w4a16, w8a16"),
        (["--to", "onnx"], "optimum-cli"),
        (["--to", "gguf", "--out", "folder"], "to end in .gguf"),
    ],
)
def test_unknown(run: Path, words: list[str], said: str) -> None:
    assert said in refusal("export", run, *words)


# Pythons that have no package: each is called as the real one, with the path of a worker.
BAD = {
    "missing": ("import json; print(json.dumps({'missing': 'mlx_lm'}))", "has no mlx_lm"),
    "fails": (
        "import json; print(json.dumps({'failed': 'ValueError: Model type x not supported.'}))",
        "could not write this model (ValueError: Model type x not supported)",
    ),
    "dies": ("import sys; sys.exit('it is too warm')", "(it is too warm)"),
    "is killed": ("import os; os.kill(os.getpid(), 9)", "(it ended with code -9)"),
    "says nothing": ("", "(its Python gave no answer)"),
    "is full": (
        "import json; print(json.dumps({'failed': 'OSError: No space left on device'}))",
        "make room",
    ),
}


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    program = folder / "python"
    program.write_text(f"#!{sys.executable}\n{code}\n")
    program.chmod(0o755)
    for variable in VARIABLES:
        monkeypatch.setenv(variable, str(program))


@pytest.mark.parametrize("kind", BAD)
def test_a_worker_that_fails_leaves_nothing(
    run: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = BAD[kind]
    (tmp_path / "bin").mkdir()
    stand_in(monkeypatch, tmp_path / "bin", code)
    out = tmp_path / "deep" / "out"
    assert said in refusal("export", run, "--to", "mlx", "--out", out)
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


# One that copies the model, and loads it as the job says.
COPIES = """
import json, os, shutil, sys
job = json.load(sys.stdin)
if job["do"] == "write":
    shutil.copytree(job["model"], job["out"], dirs_exist_ok=True)
    json.dump(job, open({seen!r}, "w"))
    answer = {{}}
else:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    with torch.no_grad():
        logits = [model(torch.tensor([row])).logits[0].numpy() for row in job["rows"]]
    np.savez(job["logits"], **{{str(at): value for at, value in enumerate(logits)}})
    ends = GenerationConfig.from_pretrained(job["model"]).eos_token_id
    answer = {{
        "tokens": [tokenizer(text).input_ids for text in job["texts"]],
        "template": tokenizer.chat_template,
        "ends": [ends] if isinstance(ends, int) else ends,
        "quantized": 14, "kept": [], "version": "1.0",
    }}
print(json.dumps(answer))
"""


def test_what_a_worker_is_given(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tmp_path / "seen.json"
    stand_in(monkeypatch, tmp_path, COPIES.format(seen=str(seen)))
    done = halfbyte("export", run, "--to", "gptq")
    out = run / "export" / "my-run-gptq-w4a16"
    assert str(out) in done.stdout.replace("\n", "")
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    job = json.loads(seen.read_text())
    assert (job["bits"], job["group"], job["method"]) == (4, 64, "gptq")
    assert job["in_fp32"]  # on a processor that only emulates bf16
    # The rows that trained, in their tokens, and none that is compared.
    found = find_adapter(run)
    source = open_base(found)
    held_out = [piece.input_ids.tolist() for piece in held_out_rows(found, source).pieces]
    given = job["rows"]
    assert len(given) == 19
    assert not [row for row in given if row in held_out]
    assert all("<|im_start|>assistant" in source.tokenizer.decode(row) for row in given)
    record = json.loads((out / "halfbyte.json").read_text())
    assert record["with_its_weights"]["kl"] < 1e-6
    assert "w4a16 by GPTQ" in (out / "README.md").read_text()
    assert "there already" in refusal("export", run, "--to", "gptq")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": [[1, 2], [3, 5]]}, "1 of 2 rows have other tokens"),
        ({"template": "x"}, "another chat template"),
        ({"ends": {0}}, "does not stop at the tokens [2]"),
        ({"logits": [-torch.arange(8.0).reshape(2, 4)]}, "nats from those"),
        ({"logits": [torch.full((2, 4), torch.nan)]}, "nan nats from those"),
        ({"ends": {0, 2}}, None),
    ],
)
def test_another_model_is_not_kept(change: dict[str, Any], said: str | None) -> None:
    made = torch.arange(8.0).reshape(2, 4)
    right = Loaded([[1, 2], [3, 4]], [made], "t", {2}, 1, [], "1.0")

    class Stub(Workshop):
        def load(self, *_: Any) -> Loaded:
            return replace(right, **change)

    mlx = TARGETS["mlx"]
    rows = [Row("a", (1, 2)), Row("b", (3, 4))]
    with nullcontext() if said is None else pytest.raises(ModelError, match=re.escape(said)):
        check_folder(
            Stub(mlx, "python", find_device("cpu")),
            Path("out"),
            rows,
            [torch.tensor([1, 2])],
            [made],
            type=mlx.weight_type("q4"),
            template="t",
            ends={2},
        )


def test_an_adapter_from_elsewhere_is_calibrated_with_data(
    run: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen.json"
    stand_in(monkeypatch, tmp_path, COPIES.format(seen=str(seen)))
    adapter, out = run / "adapter", tmp_path / "out"
    assert "name some with --data" in refusal("export", adapter, "--to", "awq", "--out", out)
    done = halfbyte("export", adapter, "--to", "awq", "--out", out, "--data", tiny_rows)
    assert "calibrated with 18 rows" in done.stdout
    assert "in 6 rows" in done.stdout
    assert "where 64 and more are usual" in done.stdout
    model = Path(find_adapter(run).base.name)
    assert "whole model" in refusal("export", model, "--to", "awq", "--out", tmp_path / "x")


def test_rows_that_fit_no_group(tiny_model: Path, tmp_path: Path) -> None:
    source = open_model(ModelRecipe(name=str(tiny_model)))
    gptq, mlx = TARGETS["gptq"], TARGETS["mlx"]
    network = build_skeleton(source.config, "tiny")
    assert choose_group(network, gptq, gptq.weight_type("w4a16"))[0] == 32
    assert choose_group(network, mlx, mlx.weight_type("bf16")) == (None, [])
    source.config.hidden_size = 36
    source.config.head_dim = 8
    network = build_skeleton(source.config, "tiny")
    assert choose_group(network, mlx, mlx.weight_type("q4"))[0] == 32
    with pytest.raises(ModelError, match="rows of 36 weights"):
        choose_group(network, gptq, gptq.weight_type("w4a16"))


def test_calibration_is_none_of_what_is_compared() -> None:
    pieces = [
        TokenizedRow(np.arange(at, at + 700, dtype=np.int32), np.ones(700, dtype=bool), at)
        for at in range(300)
    ]
    found = calibration_ids(pieces, [range(at, at + 700) for at in range(50)])
    assert len(found) == 250
    assert {len(row) for row in found} == {512}
    assert min(row[0] for row in found) == 50
