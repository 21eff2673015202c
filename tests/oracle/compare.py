"""Whether two runs were the same training."""

from __future__ import annotations

import torch

from oracle.case import Trace

MIN_COSINE = 0.999
MAX_NORM_APART = 0.01
MAX_SHARE_OF_FALL = 0.01
MIN_FALL = 0.30
# What rounding alone may do to a loss, as a share of it. Both stacks sum some hundred fp32 terms in
# different orders, which is 1e-7 at the first step, and AdamW, whose first steps are the sign of
# the gradient, moves elements whose gradient is nothing but rounding by a whole step this way or
# that. Measured: below 1e-5 at every step of every case, so a tenth of this.
ROUNDING = 1e-4


def differences(reference: Trace, ours: Trace, *, rounding: float = ROUNDING) -> list[str]:
    """Every way in which ``ours`` is not the training that ``reference`` is; empty if it is.

    ``rounding`` is the share of a loss that may lie in how the products are rounded.
    """
    found = []
    for name, expected in reference.gradients.items():
        g = ours.gradients.get(name)
        if g is None:
            found.append(f"{name} has no gradient")
            continue
        a, b = g.double().view(-1), expected.double().view(-1)
        cosine = (a @ b / (a.norm() * b.norm()).clamp(min=1e-300)).item()
        ratio = (a.norm() / b.norm()).item()
        if not cosine >= MIN_COSINE:
            found.append(f"gradient of {name}: cosine {cosine:.6f}")
        if not abs(ratio - 1.0) <= MAX_NORM_APART:
            found.append(f"gradient of {name}: norm ratio {ratio:.4f}")
    start = reference.losses[0]
    for step, (theirs, mine) in enumerate(zip(reference.losses, ours.losses, strict=True), 1):
        allowed = MAX_SHARE_OF_FALL * max(0.0, start - theirs) + rounding * theirs
        if not abs(mine - theirs) <= allowed:
            found.append(f"loss of step {step}: {mine:.6f} for {theirs:.6f} ± {allowed:.6f}")
    return found


def unsound(reference: Trace) -> list[str]:
    """Why a comparison with ``reference`` would say nothing; empty if it says something."""
    found = []
    fall = 1.0 - reference.losses[-1] / reference.losses[0]
    if not fall >= MIN_FALL:
        found.append(f"the loss falls by {fall:.1%} only")
    for name, gradient in reference.gradients.items():
        if not torch.count_nonzero(gradient) > gradient.numel() // 2:
            found.append(f"most of the gradient of {name} is zero")
    return found
