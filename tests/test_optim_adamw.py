"""The optimizers, against torch's AdamW and bitsandbytes' 8-bit AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from halfbyte.optim.adamw import AdamW
from halfbyte.optim.adamw_8bit import dequantize_moments, quantize_moments
from halfbyte.optim.choose import make_optimizer
from halfbyte.optim.flat import FlatParameters, flatten_parameters
from halfbyte.recipe.schema import TrainingRecipe

STEPS = 15
# Sizes: under 4,096 elements, exactly 4,096, not a multiple of 256, and many blocks.
SHAPES = {"tiny": (16, 30), "edge": (16, 256), "ragged": (33, 130), "large": (16, 2048)}
TRUE = torch.tensor(True)
ONE = torch.tensor(1.0)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Device, and whether Triton's kernels make the step.
WAYS = [
    pytest.param("cpu", False, id="cpu"),
    pytest.param("cuda", False, id="cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", True, id="cuda-kernels", marks=pytest.mark.gpu),
]


def start() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator) * 0.05 for n, s in SHAPES.items()}


def gradients(step: int) -> dict[str, torch.Tensor]:
    """Six orders of magnitude, with exact zeros, and a whole block of them in the first steps."""
    generator = torch.Generator().manual_seed(100 + step)
    found = {}
    for name, shape in SHAPES.items():
        g = torch.randn(shape, generator=generator)
        g *= 10.0 ** (torch.rand(shape, generator=generator) * 6 - 7)
        g[torch.rand(shape, generator=generator) < 0.02] = 0.0
        if step < 4:
            g.view(-1)[:256] = 0.0
        found[name] = g
    return found


def make(
    name: str, device: str = "cpu", use_kernels: bool = False, **settings: float
) -> tuple[dict[str, nn.Parameter], FlatParameters, AdamW]:
    named = {n: nn.Parameter(t.to(device, copy=True)) for n, t in start().items()}
    flat = flatten_parameters(named)
    optimizer = make_optimizer(name, flat, TrainingRecipe(**settings), use_kernels=use_kernels)
    assert optimizer.use_kernels == use_kernels
    return named, flat, optimizer


def put(flat: FlatParameters, found: dict[str, torch.Tensor]) -> None:
    for name, view in flat.views(flat.grad).items():
        view.copy_(found[name])


def rate(step: int) -> float:
    return 1e-3 * (1 + step) / STEPS


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs(weight_decay: float) -> None:
    named, flat, optimizer = make("adamw", weight_decay=weight_decay)
    reference = {n: nn.Parameter(t.double()) for n, t in start().items()}
    torchs = torch.optim.AdamW(reference.values(), lr=1.0, weight_decay=weight_decay)
    for step in range(STEPS):
        put(flat, gradients(step))
        optimizer.step(torch.tensor(rate(step)), torch.tensor(0.5), TRUE)
        torchs.param_groups[0]["lr"] = rate(step)
        for name, g in gradients(step).items():
            reference[name].grad = g.double() * 0.5
        torchs.step()
    for name, p in named.items():
        # Each step rounds a parameter of up to 0.2 once, to 7e-9, and moves it by up to 1e-3.
        torch.testing.assert_close(p.double(), reference[name], rtol=1e-6, atol=2e-8)
        state = torchs.state[reference[name]]
        m, v = (flat.views(optimizer.state_tensors()[key])[name] for key in ("m", "v"))
        # m sums terms of both signs, up to 1e-2; v only positive ones.
        torch.testing.assert_close(m.double(), state["exp_avg"], rtol=1e-6, atol=3e-9)
        torch.testing.assert_close(v.double(), state["exp_avg_sq"], rtol=2e-6, atol=0)


@pytest.mark.parametrize(("device", "use_kernels"), WAYS)
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_8bit_is_that_of_bitsandbytes(
    name: str, weight_decay: float, device: str, use_kernels: bool
) -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    named, flat, optimizer = make(name, device, use_kernels, weight_decay=weight_decay)
    reference = {n: nn.Parameter(t.to(device)) for n, t in start().items()}
    lr, one, true = torch.zeros((), device=device), ONE.to(device), TRUE.to(device)
    # On a GPU theirs takes 1 - β₂ and 1 - β₂ᵗ in fp32, which is up to 3e-5 off, so that a few codes
    # differ, and its weight decay, 1e-3 · λ of a parameter, takes that share of the step too.
    rtol, floor, few = (2e-6, 2e-8, 0.0) if device == "cpu" else (5e-5, 1e-7, 5e-4)
    share = rtol if device == "cpu" else rtol + 1e-3 * weight_decay
    way = {n: torch.zeros_like(p) for n, p in reference.items()}
    theirs = optim.AdamW8bit(reference.values(), lr=1.0, weight_decay=weight_decay)
    for step in range(STEPS):
        put(flat, gradients(step))
        optimizer.step(lr.fill_(rate(step)), one, true)
        theirs.param_groups[0]["lr"] = rate(step)
        for key, g in gradients(step).items():
            reference[key].grad = g.to(device)
        before = {n: p.detach().clone() for n, p in reference.items()}
        theirs.step()
        codes = apart = 0
        for key, offset in zip(flat.names, flat.offsets, strict=True):
            state, n = theirs.state[reference[key]], reference[key].numel()
            if device == "cuda":
                torch.cuda.synchronize()  # paged moments lie in main memory
            ours = {k: t.to(device) for k, t in optimizer.state_tensors().items()}
            # Steps go up to hundreds of rates, where v is rounded to 0: a parameter may be off by a
            # share of the way it went, and more where a code differs.
            way[key] += (reference[key] - before[key]).abs()
            off = (named[key] - reference[key]).abs()
            assert (off > share * way[key] + floor).sum() <= few * n
            if key == "tiny":
                assert state["state1"].dtype == torch.float32
                at = slice(offset - flat.groups[0].blocked, offset - flat.groups[0].blocked + n)
                m, v = state["state1"].view(-1), state["state2"].view(-1)
                torch.testing.assert_close(ours["m"][at], m, rtol=rtol, atol=1e-9)
                torch.testing.assert_close(ours["v"][at], v, rtol=rtol, atol=1e-20)
                continue
            for mine, his in (("m", "1"), ("v", "2")):
                scales = ours[f"absmax_{mine}"][offset // 256 : -(-(offset + n) // 256)]
                torch.testing.assert_close(scales, state[f"absmax{his}"], rtol=rtol, atol=0)
                difference = (
                    ours[f"codes_{mine}"][offset : offset + n].int()
                    - state[f"state{his}"].view(-1).int()
                ).abs()
                # In a block of zeros 0 / 0 has whatever code, and the value 0 all the same.
                difference *= scales.repeat_interleave(256)[:n] > 0
                assert difference.max() <= 1
                codes, apart = codes + n, apart + int(difference.count_nonzero())
        assert apart <= 1e-4 * codes, f"step {step}: {apart} of {codes} codes differ"


def test_gradients_are_scaled_as_they_are_read() -> None:
    """A clip factor gives what the gradients times that factor give, bit for bit."""
    _, flat, optimizer = make("adamw_8bit")
    _, flat2, optimizer2 = make("adamw_8bit")
    for step in range(3):
        put(flat, gradients(step))
        put(flat2, {n: g * 0.25 for n, g in gradients(step).items()})
        optimizer.step(torch.tensor(1e-3), torch.tensor(0.25), TRUE)
        optimizer2.step(torch.tensor(1e-3), ONE, TRUE)
    assert torch.equal(flat.data, flat2.data)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_without_update_nothing_changes(name: str, bad: float) -> None:
    _, flat, optimizer = make(name, weight_decay=0.1)
    put(flat, gradients(0))
    optimizer.step(torch.tensor(1e-3), ONE, TRUE)
    state = {n: t.clone() for n, t in optimizer.state_tensors().items()}
    weights = flat.data.clone()
    put(flat, gradients(1))
    flat.grad[[0, 5000, -1]] = bad
    optimizer.step(torch.tensor(1e-3), torch.tensor(bad), torch.tensor(False))
    assert torch.equal(flat.data, weights)
    assert all(torch.equal(t, state[n]) for n, t in optimizer.state_tensors().items())
    assert state["count"] == 1
    # And the next step is the one it would have been.
    put(flat, gradients(1))
    optimizer.step(torch.tensor(1e-3), ONE, TRUE)
    _, flat2, optimizer2 = make(name, weight_decay=0.1)
    for step in (0, 1):
        put(flat2, gradients(step))
        optimizer2.step(torch.tensor(1e-3), ONE, TRUE)
    assert torch.equal(flat.data, flat2.data)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_state_goes_out_and_comes_back(name: str) -> None:
    _, flat, optimizer = make(name)
    for step in range(3):
        put(flat, gradients(step))
        optimizer.step(torch.tensor(1e-3), ONE, TRUE)
    state = {n: t.clone() for n, t in optimizer.state_tensors().items()}
    weights = flat.data.clone()
    _, flat2, optimizer2 = make(name)
    flat2.data.copy_(weights)
    optimizer2.load_state_tensors(state)
    for f, o in ((flat, optimizer), (flat2, optimizer2)):
        put(f, gradients(3))
        o.step(torch.tensor(1e-3), ONE, TRUE)
    assert not torch.equal(flat.data, weights)
    assert torch.equal(flat.data, flat2.data)


def test_the_size_of_the_chunks_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    _, flat, optimizer = make("adamw_8bit")
    _, flat2, optimizer2 = make("adamw_8bit")
    for step in range(3):
        put(flat, gradients(step))
        put(flat2, gradients(step))
        monkeypatch.setattr("halfbyte.optim.adamw.CHUNK_CPU", 1 << 16)
        optimizer.step(torch.tensor(1e-3), ONE, TRUE)
        monkeypatch.setattr("halfbyte.optim.adamw.CHUNK_CPU", 512)
        optimizer2.step(torch.tensor(1e-3), ONE, TRUE)
    assert torch.equal(flat.data, flat2.data)


@pytest.mark.gpu
@pytest.mark.parametrize("use_kernels", [False, True])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_captured_step_is_the_eager_one(name: str, use_kernels: bool) -> None:
    lr, scale, do_update = (t.cuda() for t in (ONE.clone(), ONE.clone(), TRUE.clone()))
    weights = []
    for captured in (False, True):
        _, flat, optimizer = make(name, "cuda", use_kernels, weight_decay=0.1)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step(lr, scale, do_update)
        for step in range(4):
            put(flat, gradients(step))
            lr.fill_(rate(step))
            do_update.fill_(step != 2)
            if captured:
                graph.replay()
            else:
                optimizer.step(lr, scale, do_update)
        assert optimizer.count == 3
        weights.append(flat.data.clone())
    assert torch.equal(*weights)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_codes_of_values_that_are_hard_to_scale(signed: bool, device: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    values = torch.zeros(5 * 256)
    values[256] = 1e-42  # a subnormal scale
    values[512:768] = 1.0
    values[768:1024] = torch.logspace(-12, 0, 256)
    values[1024:] = torch.linspace(-1, 1, 256) if signed else torch.linspace(0, 1, 256)
    values = values.to(device)
    codes, absmax = quantize_moments(values, signed)
    book = functional.create_dynamic_map(signed=signed).to(device)
    theirs, scales = torch.ops.bitsandbytes.quantize_blockwise(values, book, 256)
    # The reciprocal of a subnormal scale is infinite, and a GPU takes it for 0; a block of zeros
    # has whatever codes.
    regular = torch.tensor([False, False, True, True, True], device=device)
    assert torch.equal(absmax[regular], scales[regular])
    assert torch.equal(codes.view(5, 256)[regular], theirs.view(5, 256)[regular])
    ours = dequantize_moments(codes, absmax, signed)
    reference = functional.dequantize_blockwise(theirs, absmax=scales, code=book, blocksize=256)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-37)
