"""benchmarks/step_profile.py without a GPU: kernels of a step are put into the right parts."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
floors = importlib.import_module("floors")
step_profile = importlib.import_module("step_profile")

PRODUCT = "nvjet_sm90_tst_128x128_64x6"
SMALL = "void at::native::vectorized_elementwise_kernel<4, …>"

DOWN = ["lora_down_kernel", "sum_down_kernel"]
FORWARD = [
    *("_rms_norm", *DOWN, PRODUCT, "_rope", "forward_kernel", *DOWN, PRODUCT),
    *("_rms_norm", PRODUCT, "_gated", PRODUCT),
]
GRADS = ["lora_grads_kernel", "sum_grads_kernel", "lora_grad_input_kernel"]
BACKWARD = [
    *(PRODUCT, "_gated_backward", PRODUCT, "_rms_norm_backward"),
    *(PRODUCT, *GRADS, "delta_kernel", "backward_kernel", "sum_parts_kernel", "_rope"),
    *(PRODUCT, *GRADS, "_rms_norm_backward"),
]
HEAD = [PRODUCT, "cublasLt::splitKreduce_kernel", "_cross_entropy_rows", PRODUCT, SMALL]
STEP = [
    *("Memcpy HtoD (Pinned -> Device)", SMALL, "_dropout_keys", SMALL),
    *(*FORWARD, *FORWARD, "_rms_norm", *HEAD, "_rms_norm_backward", *BACKWARD, *BACKWARD),
    *(
        SMALL,
        "_adamw_scalars",
        "_adamw_8bit",
        SMALL,
        "fold_b_kernel",
        "Memcpy DtoH (Device -> Pinned)",
    ),
]


def test_every_kernel_finds_its_part_in_each_of_two_steps() -> None:
    found = Counter(step_profile.parts_of(STEP * 2, layers=2))
    assert found == {
        part: 2 * count
        for part, count in {
            floors.INPUT: 4,
            floors.FORWARD: 8,
            floors.BACKWARD: 8,
            floors.THIN: 2 * (4 + 6),
            floors.ATTENTION: 2 * 4,
            floors.NORMS: 2 * 4 + 2,
            floors.GATED: 4,
            floors.ROTARY: 4,
            floors.HEAD: 5,
            floors.OPTIMIZER: 5,
            floors.WEIGHTS: 1,
        }.items()
    }


def test_the_counts_are_those_of_the_floors() -> None:
    """What a layer launches, as floors.py has it, is what the list above has."""
    shape = floors.Shape(layers=2)
    work = floors.step_work(shape, [64], labels=64)
    found = Counter(step_profile.parts_of(STEP, layers=2))
    for part in (
        *(floors.FORWARD, floors.BACKWARD, floors.THIN, floors.ATTENTION),
        *(floors.NORMS, floors.GATED, floors.ROTARY),
    ):
        assert found[part] == floors.kernels(floors.of_part(work, part)), part


def test_products_of_a_layer_made_again_count_as_backward_and_strangers_as_others() -> None:
    again = ["_nf4_dequantize", *FORWARD[:-2], SMALL]
    step = [*STEP[: STEP.index("_rms_norm_backward") + 1], *again, *BACKWARD]
    found = step_profile.parts_of(step, layers=2)
    behind = Counter(found[-len(again) - len(BACKWARD) :])
    assert behind[floors.BACKWARD] == 3 + 4
    assert behind[floors.FORWARD] == 0
    assert behind[step_profile.OTHER] == behind[floors.WEIGHTS] == 1
