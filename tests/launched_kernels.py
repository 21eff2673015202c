"""Which kernels a run launches, and which of them a trial has compiled before.

    python tests/launched_kernels.py RECIPE.yaml CAPABILITY keep|scratch

Prints a line of JSON: the compile-time identity of every kernel that two steps in every bucket and
an evaluation launch (``run``), and of those that the trial of the run's spec launches (``trial``).
Nothing is compiled and nothing runs: Triton asks a hook with what it would compile, and the tensors
lie on the CPU. Triton's interpreter has to be off.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from halfbyte.evaluate.held_out import held_out_loss
from halfbyte.kernels import choice
from halfbyte.kernels.choice import PLAIN
from halfbyte.kernels.trial import adapters as trial_adapters
from halfbyte.kernels.trial import base as trial_base
from halfbyte.kernels.trial import spec as trial_spec
from halfbyte.kernels.trial import step as trial_step
from halfbyte.kernels.trial.base import WrongResultError
from halfbyte.kernels.trial.cases import run_case
from halfbyte.model.fused import FusedNetwork
from halfbyte.plan.device import Device
from halfbyte.recipe.load import load_recipe
from halfbyte.run import kernel_trial
from halfbyte.run.assembly import Assembly, assemble
from halfbyte.run.record import RunRecord
from halfbyte.run.setup import load_model, make_trainer
from offline_compile import Absent

launched: set[str] = set()


def note(key: str, fn: Any, **_: Any) -> bool:
    """Triton's hook; true says that nothing is to be compiled."""
    launched.add(f"{fn.name} {key}")
    return True


def launch_only(kernel: JITFunction[Any], grid: Any) -> Any:
    def launch(*args: Any, **kwargs: Any) -> None:
        kernel.run(*args, grid=grid, warmup=True, **kwargs)

    return launch


def assemble_on(device: Device, recipe_file: Path) -> Assembly:
    """As on a machine with ``device``."""
    from halfbyte.run import assembly as room

    room.find_device = lambda asked: device  # type: ignore[attr-defined]
    return assemble(load_recipe(recipe_file), RunRecord())


def without_efficient_attention() -> None:
    """Not Triton's, and not there on a CPU."""
    names = ("attention", "attention_backward", "attention_lse_shape")
    plain = replace(choice.ELEMENTWISE, **{name: getattr(PLAIN, name) for name in names})
    choice.ELEMENTWISE = trial_spec.SETS["element-wise"] = plain


def no_comparisons() -> None:
    """Of what has not been computed."""
    for module in (trial_base, trial_adapters, trial_step):
        module.compare = lambda *_: None


def run(assembly: Assembly, keep: bool) -> None:
    """Steps in every bucket, and an evaluation."""
    cpu = replace(assembly.device, kind="cpu")
    model, _ = load_model(assembly.recipe, assembly.source, cpu, copied_layers=0)
    kernels, _ = choice.choose_kernels(assembly.device.capability)
    model.fused = FusedNetwork(model.network, model.head, model.compute_dtype, kernels)
    model.fused.keep_copies(None if keep else 0)
    model.fused.use_scratch()
    trainer = make_trainer(assembly, model)
    trainer.optimizer.use_kernels = True
    left = {bucket.tokens for bucket in assembly.buckets or []}
    for number in range(1, assembly.resolved.steps + 1):
        batches = assembly.batches.step(number)
        if left & {len(batch.input_ids) for batch in batches}:
            left -= {len(batch.input_ids) for batch in batches}
            trainer.step(number, batches)
    assert not left, left
    held_out_loss(model, assembly.data.held_out)


def main(recipe_file: str, capability: str, keep: str) -> None:
    major, minor = divmod(int(capability), 10)
    driver.set_active(Absent(int(capability)))
    knobs.runtime.jit_cache_hook = note
    JITFunction.__getitem__ = launch_only
    without_efficient_attention()
    device = Device("cuda", "absent", 80 << 30, 80 << 30, (major, minor), major >= 8, 2)
    assembly = assemble_on(device, Path(recipe_file))
    run(assembly, keep == "keep")
    ours = set(launched)
    launched.clear()
    spec = kernel_trial.trial_spec(assembly, "cpu")
    assert spec is not None
    no_comparisons()
    for task in trial_spec.trial_tasks(spec):
        with suppress(WrongResultError):  # of keys, which are compared bit by bit
            run_case(spec, task)
    print(json.dumps({"run": sorted(ours), "trial": sorted(launched)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
