"""Cross-entropy of a row of logits and its gradient, written over the logits.

    z = cap(scale · x)      loss = logsumexp(z) - z[label]      cap(z) = softcap · tanh(z / softcap)
    dx = (softmax(z) - onehot(label)) · scale · (1 - (z / softcap)²) · grad_scale

A program has a row. It passes over it twice: for the largest z and the sum of exp(z - largest),
each lane for the elements that it sees (Milakov and Gimelshein, 2018, arXiv 1805.02867), and then
for the gradient. What bounds it is memory: 4 bytes a logit in 16 bits, the second reading coming
from the L2 cache where the rows in flight fit there; 33 µs for 768 × 32,000 at 3 TB/s.

:func:`head_loss` has the head's two products around it, chunk by chunk (Hsu et al., 2024, arXiv
2410.10989, section 3.2), so that all logits never stand in memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfbyte.kernels.triton_shim import tl, triton

IGNORED = -100  # the label of a row that is not learned

# Columns of one iteration, 16 a lane. A short row is over soon, and what counts is that all rows
# run at once: with four warps 768 rows do on 132 multiprocessors, with eight they do not.
_BLOCK_SHORT, _WARPS_SHORT = 2048, 4
_BLOCK_LONG, _WARPS_LONG = 4096, 8
_LONG = 65536

_LOG2_E = math.log2(math.e)
_ROW_ALIGNMENT = 16  # elements: rows of any vocabulary begin where wide loads can


def cross_entropy_rows_reference(
    logits: Tensor,
    labels: Tensor,
    loss: Tensor,
    grad_scale: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    need_grad: bool = True,
) -> None:
    """What :func:`cross_entropy_rows_` does, in plain PyTorch."""
    with torch.enable_grad():
        x = logits.detach().to(torch.float32, copy=True).requires_grad_()
        z = x * scale
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        losses = torch.nn.functional.cross_entropy(
            z, labels.long(), ignore_index=IGNORED, reduction="none"
        )
    if need_grad:
        (grad,) = torch.autograd.grad(losses, x, torch.ones_like(losses))
        # Of a row without a label 0, even where its logits are not finite.
        logits.copy_(torch.where(labels[:, None] == IGNORED, 0.0, grad * grad_scale))
    loss.copy_(losses.detach())


@triton.jit
def _scores(x, scale, softcap, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """z · log₂e of logits x, as powers of two cost less than those of e; see the launcher."""
    z = x.to(tl.float32) * scale
    if CAPPED:
        # softcap · tanh; at ±∞ it is ±softcap as well.
        z = softcap * (1.0 - 2.0 / (tl.exp2(z) + 1.0))
    return z


@triton.jit
def _accumulate(z, largest, total):  # type: ignore[no-untyped-def]
    """Each lane's largest z and its sum of 2^(z - largest), with one z more."""
    ahead = z - largest
    # Of 2^(largest - new largest) and 2^(z - new largest) one is 1, and this is the other.
    share = tl.exp2(-tl.abs(ahead))
    total = tl.where(ahead > 0.0, total * share + 1.0, total + share)
    return tl.maximum(largest, z), total


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    x, column, label, top, inverse, factor, scale, softcap, CAPPED: tl.constexpr
):
    z = _scores(x, scale, softcap, CAPPED)
    share = tl.exp2(z - top) * inverse - (column == label).to(tl.float32)
    if CAPPED:
        t = z / softcap
        share *= 1.0 - t * t
    return (share * factor).to(x.dtype)


# One label and one loss of each are read and written: where they begin makes no other kernel.
@triton.jit(do_not_specialize_on_alignment=["labels", "loss"])
def _cross_entropy_rows(  # type: ignore[no-untyped-def]
    logits,
    stride,
    labels,
    loss,
    grad_scale,
    scale,
    score_scale,
    score_cap,
    V: tl.constexpr,
    CAPPED: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    column = tl.arange(0, BLOCK)
    whole: tl.constexpr = V // BLOCK * BLOCK
    rest = whole + column
    if label == -100:
        tl.store(loss + row, 0.0)
        if NEED_GRAD:
            zeros = tl.zeros([BLOCK], logits.dtype.element_ty)
            for start in range(0, whole, BLOCK):
                tl.store(logits + start + column, zeros)
            if whole < V:
                tl.store(logits + rest, zeros, mask=rest < V)
        return

    # Read before any thread writes over it. A label that is no column gives a loss of NaN.
    known = (label >= 0) & (label < V)
    chosen = tl.load(logits + label, mask=known, other=float("nan"))
    chosen = _scores(chosen, score_scale, score_cap, CAPPED)

    # From a finite number on: the difference of two infinities would be NaN.
    largest = tl.full([BLOCK], -3e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, whole, BLOCK):
        z = _scores(tl.load(logits + start + column), score_scale, score_cap, CAPPED)
        largest, total = _accumulate(z, largest, total)
    if whole < V:
        x = tl.load(logits + rest, mask=rest < V, other=0.0)
        z = _scores(x, score_scale, score_cap, CAPPED)
        largest, total = _accumulate(tl.where(rest < V, z, float("-inf")), largest, total)
    top = tl.max(largest, axis=0)
    sums = tl.sum(total * tl.exp2(largest - top), axis=0)
    tl.store(loss + row, (tl.log2(sums) + (top - chosen)) * 0.6931471805599453)

    if NEED_GRAD:
        factor = tl.load(grad_scale) * scale
        inverse = 1.0 / sums
        place = label.to(tl.int32)
        # Back from the end, which was read last and is in a cache if anything is.
        if whole < V:
            x = tl.load(logits + rest, mask=rest < V, other=0.0)
            dx = _gradient(x, rest, place, top, inverse, factor, score_scale, score_cap, CAPPED)
            tl.store(logits + rest, dx, mask=rest < V)
        for back in range(BLOCK, whole + BLOCK, BLOCK):
            at = whole - back + column
            x = tl.load(logits + at)
            dx = _gradient(x, at, place, top, inverse, factor, score_scale, score_cap, CAPPED)
            tl.store(logits + at, dx)


def cross_entropy_rows_(
    logits: Tensor,
    labels: Tensor,
    loss: Tensor,
    grad_scale: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    need_grad: bool = True,
) -> None:
    """``loss`` [L] of each row of ``logits`` [L, V], and the gradients over the logits.

    ``logits`` bf16, fp16 or fp32, its rows any distance apart; ``labels`` int64 or int32 [L], -100
    where nothing is learned (loss 0, gradient 0); ``loss`` fp32 [L]. With ``need_grad`` the logits
    become d loss / d logits · ``grad_scale`` (fp32 scalar on the device), rounded once: what fp16
    does not hold is infinite, and logits that are not finite give losses that are not.
    """
    rows, width = logits.shape
    if rows == 0:
        return
    if width < _LONG:
        block, warps = min(_BLOCK_SHORT, triton.next_power_of_2(width)), _WARPS_SHORT
    else:
        block, warps = _BLOCK_LONG, _WARPS_LONG
    # Capped, the kernel's power of two is that of the tanh: tanh(y) = 1 - 2 / (exp(2y) + 1).
    score_scale = scale * _LOG2_E * (1.0 if softcap is None else 2.0 / softcap)
    _cross_entropy_rows[(rows,)](
        logits,
        logits.stride(0),
        labels,
        loss,
        grad_scale,
        float(scale),  # of an int 1 Triton would make a constant, and another kernel
        score_scale,
        0.0 if softcap is None else softcap * _LOG2_E,
        V=width,
        CAPPED=softcap is not None,
        NEED_GRAD=need_grad,
        BLOCK=block,
        num_warps=warps,
    )


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    grad_scale: Tensor,
    d_hidden: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    chunk_bytes: int,
) -> Tensor:
    """Sum of the cross-entropies of ``hidden`` [L, H] under ``weight`` [V, H], fp32 scalar.

    ``labels`` [L] as in :func:`cross_entropy_rows_`. ``d_hidden`` [L, H] receives the gradient of
    the sum times ``grad_scale``; None asks for none. All but the labels and ``grad_scale`` are of
    one type. The logits of as many rows as ``chunk_bytes`` hold, but of one at least, are in
    memory at once; their buffer is made here.
    """
    length, vocabulary = len(hidden), len(weight)
    pitch = -(-vocabulary // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
    rows = max(1, min(length, chunk_bytes // (pitch * hidden.element_size())))
    buffer = hidden.new_empty(rows, pitch)
    # Products of a CPU with AMX read past the end of a row and multiply what they find by zero
    # (oneDNN issue 5717), and what was in memory may be NaN.
    buffer[:, vocabulary:] = 0.0
    losses = torch.empty(length, dtype=torch.float32, device=hidden.device)
    for start in range(0, length, rows):
        at = slice(start, min(start + rows, length))
        logits = buffer[: at.stop - start, :vocabulary]
        torch.mm(hidden[at], weight.t(), out=logits)
        cross_entropy_rows_(
            logits,
            labels[at],
            losses[at],
            grad_scale,
            scale=scale,
            softcap=softcap,
            need_grad=d_hidden is not None,
        )
        if d_hidden is not None:
            torch.mm(logits, weight, out=d_hidden[at])
    return losses.sum()


def head_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    grad_scale: Tensor,
    d_hidden: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    chunk_bytes: int = 0,
) -> Tensor:
    """What :func:`head_loss` does, in plain PyTorch, fp32 and one piece."""
    logits = hidden.float() @ weight.float().t()
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    cross_entropy_rows_reference(
        logits,
        labels,
        losses,
        grad_scale,
        scale=scale,
        softcap=softcap,
        need_grad=d_hidden is not None,
    )
    if d_hidden is not None:
        d_hidden.copy_(logits @ weight.float())
    return losses.sum()
