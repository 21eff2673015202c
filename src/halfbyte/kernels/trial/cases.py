"""Each kernel launched as a run will launch it, and compared with its reference.

A kernel is compiled anew for each set of compile-time arguments, and how integers and addresses
divide by 16 counts as one. So what is made here has the widths, strides and types that
:mod:`halfbyte.model.fused_layer` and the optimizer use; the number of tokens is a batch's own where
a launch depends on it, else small. Tolerances are loose: a kernel that a compiler has got wrong is
wrong altogether.
"""

from __future__ import annotations

import torch

from halfbyte.kernels.trial.adapters import AdapterCases
from halfbyte.kernels.trial.layer import LayerCases
from halfbyte.kernels.trial.spec import TrialSpec, kernel_of, trial_tasks
from halfbyte.kernels.trial.step import StepCases


class Cases(LayerCases, AdapterCases, StepCases):
    """One method a kernel, of its name."""


def run_case(spec: TrialSpec, task: str) -> None:
    """Try one of :func:`~halfbyte.kernels.trial.spec.trial_tasks`.

    Raises WrongResultError, or whatever compiling and launching raise.
    """
    if task not in trial_tasks(spec):
        raise ValueError(f"there is no {task} to try")
    number = task.partition(".")[2]
    case = getattr(Cases(spec), kernel_of(task))
    with torch.no_grad():
        case(spec.groups[int(number)]) if number else case()
