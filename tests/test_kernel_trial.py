"""Kernels are tried in other processes, and what happens to those happens to no run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import triton_interpreter  # noqa: F401

# isort: split
from halfbyte.events.types import Event, Fallback
from halfbyte.kernels.choice import ALL, ELEMENTWISE, PLAIN
from halfbyte.kernels.trial import processes as trial_module
from halfbyte.kernels.trial import spec as trial_spec
from halfbyte.kernels.trial.base import WrongResultError
from halfbyte.kernels.trial.cases import run_case
from halfbyte.kernels.trial.processes import Outcome, Trial, without
from halfbyte.kernels.trial.spec import TrialSpec, kernel_of, trial_tasks
from halfbyte.plan.device import Device
from halfbyte.run import kernel_trial
from halfbyte.run.kernel_trial import passed
from kernel_trial_case import small_spec

SPEC = small_spec()
TESTS = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Trial]:
    """Starts a trial in which kernels behave as is said; two processes share the work."""

    def begin(workers: int = 2, task_seconds: float = 60.0, **how: str) -> Trial:
        behaviour = tmp_path / "behaviour.json"
        named = {name.replace("__", "."): value for name, value in how.items()}
        named[""] = named.pop("start", "ok")
        behaviour.write_text(json.dumps({**named, "tasks": trial_tasks(SPEC)}))
        command = (sys.executable, str(TESTS / "fake_trial_worker.py"), str(behaviour))
        return Trial(SPEC, tmp_path, workers=workers, command=command, task_seconds=task_seconds)

    return begin


def tried(folder: Path) -> list[str]:
    return (folder / "tried").read_text().split()


def test_spec_survives_its_file() -> None:
    assert TrialSpec.from_json(SPEC.to_json()) == SPEC


def test_all_well_leaves_a_mark_and_no_second_trial(
    start: Callable[..., Trial], tmp_path: Path
) -> None:
    with start() as trial:
        assert trial.finish() == Outcome()
    assert sorted(tried(tmp_path)) == sorted(trial_tasks(SPEC))
    before = time.perf_counter()
    with Trial(SPEC, tmp_path, workers=2, command=("/nonexistent",)) as again:
        assert again.finish() == Outcome()
    assert time.perf_counter() - before < 1.0  # no process; some milliseconds
    other = replace(SPEC, hidden=64)
    with Trial(other, tmp_path, workers=2, command=("/nonexistent",)) as trial:
        assert set(trial.finish().untried) == {kernel_of(task) for task in trial_tasks(SPEC)}


def test_mark_is_not_for_other_kernels(
    start: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with start() as trial:
        trial.finish()
    changed = shutil.copytree(trial_spec._KERNELS, tmp_path / "kernels")
    monkeypatch.setattr(trial_spec, "_KERNELS", changed)

    def mark() -> Path:
        with Trial(SPEC, tmp_path, workers=1, command=("/nonexistent",)) as again:
            return again.mark

    assert mark() == trial.mark
    (changed / "rope.py").write_text("# another kernel\n")
    assert mark() != trial.mark


@pytest.mark.parametrize("how", ["wrong", "failed"])
def test_what_does_not_work_is_replaced(
    start: Callable[..., Trial], tmp_path: Path, how: str
) -> None:
    with start(rope=how, lora_down__1=how) as trial:
        outcome = trial.finish()
    assert outcome == Outcome({"lora_down": f"it is {how}", "rope": f"it is {how}"})
    assert len(tried(tmp_path)) == len(trial_tasks(SPEC))  # a second time it would be no better
    assert not trial.mark.exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_that_aborts_takes_one_kernel_with_it(
    start: Callable[..., Trial], tmp_path: Path, workers: int
) -> None:
    with start(workers, attention="abort", gated="abort") as trial:
        outcome = trial.finish()
    assert set(outcome.replaced) == {"attention", "gated"}
    assert outcome.untried == {}
    for reason in outcome.replaced.values():
        assert "SIGABRT" in reason
        assert "LLVM ERROR: cannot select" in reason
    assert tried(tmp_path).count("gated") == 2
    assert tried(tmp_path).count("rope") == 1
    assert not trial.mark.exists()


def test_who_was_not_at_fault_passes_alone(start: Callable[..., Trial]) -> None:
    with start(gated="abort beside others", rope="memory beside others") as trial:
        assert trial.finish() == Outcome()
    assert trial.mark.exists()


def test_who_dies_while_its_results_are_read_is_not_lost(
    start: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    paused: list[Path] = []

    def slowly(path: Path) -> str:
        if path.suffix == ".json" and not paused:
            paused.append(path)
            time.sleep(2)  # a busy machine: after the first look at what is taken, all is done
        return path.read_text() if path.exists() else ""

    monkeypatch.setattr(trial_module, "_read", slowly)
    with start(gated="abort beside others", rope="abort beside others") as begun:
        assert begun.finish() == Outcome()


def test_a_broken_device_is_no_other_kernels_fault(start: Callable[..., Trial]) -> None:
    with start(attention="broken") as trial:
        assert trial.finish() == Outcome({"attention": "it is broken"})


def test_a_kernel_that_hangs_is_given_up(start: Callable[..., Trial]) -> None:
    with start(rms_norm="hang", task_seconds=0.5) as trial:
        outcome = trial.finish()
    assert set(outcome.replaced) == {"rms_norm"}
    assert "not done after" in outcome.replaced["rms_norm"]


def test_no_memory_for_a_trial_says_nothing_against_a_kernel(start: Callable[..., Trial]) -> None:
    with start(head_loss="memory") as trial:
        assert trial.finish() == Outcome({}, {"head_loss": "it is memory"})
    assert not trial.mark.exists()


def test_processes_that_do_not_start_try_nothing(start: Callable[..., Trial]) -> None:
    with start(start="exit") as trial:
        outcome = trial.finish()
    assert outcome.replaced == {}
    assert set(outcome.untried) == {kernel_of(task) for task in trial_tasks(SPEC)}
    assert all("no device" in reason for reason in outcome.untried.values())


def test_leaving_early_ends_the_processes(start: Callable[..., Trial]) -> None:
    with start(start="hang") as trial:
        numbers = [worker.process.pid for worker in trial._running]
        assert trial._where is not None
        assert trial._where.exists()
    assert len(numbers) == 2
    for number in numbers:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)
    assert not trial._where.exists()


def test_what_takes_a_kernels_place() -> None:
    found = without(ALL, ALL, ["rope", "lora_grads", "adamw"])
    assert found == replace(ALL, rope=PLAIN.rope, lora_grads=PLAIN.lora_grads, adamw=False)
    attention = ("attention", "attention_backward", "attention_lse_shape")
    for name in attention[:2]:
        for kernels, other in ((ALL, ELEMENTWISE), (ELEMENTWISE, PLAIN)):
            found = without(kernels, kernels, [name])
            assert found == replace(kernels, **{part: getattr(other, part) for part in attention})
    # A run that goes on without Triton's attention has lost nothing more.
    assert without(found := without(ALL, ALL, ["attention"]), ALL, ["attention"]) == found


def test_a_run_tells_of_what_it_does_without(start: Callable[..., Trial]) -> None:
    events: list[Event] = []
    with start(attention="abort", gated="failed", rope="failed", fold_b="memory") as trial:
        kernels = passed(trial, ALL, events.append)  # type: ignore[arg-type]
    assert [event.what for event in events if isinstance(event, Fallback)] == [
        "memory-efficient attention in place of the kernel attention",
        "PyTorch's own operations in place of the kernels rope, gated",
        "kernels used without a trial: fold_b",
    ]
    assert kernels == without(ALL, ALL, ["attention", "gated", "rope"])
    assert passed(None, ALL, events.append) is ALL  # type: ignore[arg-type]


def test_a_run_goes_on_where_nothing_can_be_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The whole way of a run on a GPU, whose processes find theirs missing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Absent 99")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 99)
    monkeypatch.setattr(
        kernel_trial, "trial_spec", lambda assembly, device: replace(SPEC, device=device)
    )
    gpu = Device("cuda", "Absent 99", 1 << 30, 1 << 30, (9, 0), True, 2)
    events: list[Event] = []
    with kernel_trial.kernel_trial(
        SimpleNamespace(device=gpu, recipe=SimpleNamespace(memory_limit_gb=None)),  # type: ignore[arg-type]
        events.append,  # type: ignore[arg-type]
    ) as trial:
        assert passed(trial, ALL, events.append) == ALL  # type: ignore[arg-type]
    (event,) = events
    assert isinstance(event, Fallback)
    assert event.what.startswith("kernels used without a trial: attention_backward, attention,")
    assert "CUDA" in event.reason
    (folder,) = (tmp_path / "halfbyte").iterdir()
    assert folder.name.endswith("-sm90-absent-99")
    assert os.environ["TRITON_CACHE_DIR"] == str(folder)
    assert list(folder.iterdir()) == []


def nothing(*arguments: Any, **how: Any) -> Any:
    """A kernel that does nothing."""
    return torch.zeros(())


@pytest.mark.parametrize("task", [t for t in trial_tasks(SPEC) if kernel_of(t) != "adamw"])
def test_a_kernel_that_does_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    mutant = replace(ALL, **{kernel_of(task): nothing})
    monkeypatch.setitem(trial_spec.SETS, "all", mutant)
    with pytest.raises(WrongResultError, match=kernel_of(task)):
        run_case(small_spec(compute_dtype="float32"), task)


@pytest.mark.parametrize("name", ["adamw_8bit_", "adamw_32bit_", "adamw_scalars_"])
def test_an_optimizer_that_does_nothing_is_wrong(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from halfbyte.kernels import adamw

    monkeypatch.setattr(adamw, name, nothing)
    with pytest.raises(WrongResultError, match="adamw"):
        run_case(SPEC, "adamw")


@pytest.mark.parametrize("kernels", ["all", "element-wise"])
def test_kernels_pass_in_fp32(kernels: str) -> None:
    spec = replace(small_spec(kernels, "float32"), batches=SPEC.batches[:1], evaluated=())
    every = set(trial_tasks(spec))
    if kernels == "element-wise":  # what the other set does not have
        every = {task for task in every if task.startswith("lora")}
    for task in every:
        if not task.startswith("attention"):  # which has its turn below
            run_case(spec, task)


def test_kernels_pass_in_processes_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = replace(SPEC, windows=(16,), batches=SPEC.batches[1:])
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    code = (
        "import sys, triton_interpreter; from halfbyte.kernels.trial.worker import main;"
        "sys.exit(main(sys.argv[1:]))"
    )
    with Trial(spec, tmp_path, workers=2, command=(sys.executable, "-c", code)) as trial:
        assert trial.finish() == Outcome()


WAYS = {
    "an H100, copies kept": ("90", "keep", {}, {}),
    "a T4, weights made anew": (
        *("75", "scratch"),
        {"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 6, "lora_dropout": 0.0},
        {"optimizer": "adamw", "batch_size": 3, "gradient_accumulation": 1},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_compiles_nothing_that_its_trial_has_not(
    way: str, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    """Every kernel that training and evaluating launch, as the compiler tells them apart."""
    import yaml
    from transformers import AutoConfig, AutoModelForCausalLM

    capability, keep, lora, training = WAYS[way]
    config = AutoConfig.from_pretrained(tiny_model)
    config.update({"hidden_size": 128, "intermediate_size": 192, "head_dim": 32})
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    recipe = {
        "model": {"name": str(folder)},
        "data": {"path": str(tiny_rows), "held_out": 4, "packing": capability == "75"},
        "lora": {"r": 4, "lora_dropout": 0.1, **lora},
        "training": {"batch_size": 2, "gradient_accumulation": 2, "epochs": 2, **training},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        [sys.executable, str(TESTS / "launched_kernels.py"), "recipe.yaml", capability, keep],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["run"]) > 12
    assert set(found["run"]) - set(found["trial"]) == set()


def test_kernels_of_a_t4_compile_for_it() -> None:
    """Its multiprocessors have 64 KiB of shared memory, and no products that Triton knows."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "compile_trial.py")],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    names = {kernel["kernel"] for kernel in found}
    assert names == {
        *("_rms_norm", "_rms_norm_backward", "_rope", "_gated", "_gated_backward", "fold_b_kernel"),
        *("_nf4_dequantize", "_dropout_keys", "_apply_dropout", "_cross_entropy_rows"),
        *("_adamw_scalars", "_adamw_8bit", "_adamw_32bit"),
    }
    assert max(kernel["shared"] for kernel in found) <= 64 * 1024


def test_the_worker_imports_nothing_that_is_slow() -> None:
    code = (
        "import sys, halfbyte.kernels.trial.worker as _;"
        "slow = {'transformers', 'datasets', 'pyarrow', 'pydantic', 'matplotlib', 'rich'};"
        "print(*sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
